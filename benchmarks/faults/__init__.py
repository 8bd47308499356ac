"""A campaign of faults: parts of Glimpse die, freeze and lie under load, and the clients keep the books.

    python -m benchmarks.faults --seed 1 --count 200

isolation   namespaces of the campaign's own: its processes, its /dev/shm, its small disks
world       two gateways, two Tritons and one Redis, and how each is started again
proxy       what lies between a gateway and its Triton or its Redis, and can misbehave
catalogue   every fault: how it is caused, how it ends, which requests it may fail
hostile     callers that mean harm
clients     honest callers, and the ledger of every request and its end
invariants  what must hold, checked over the ledger alone
campaign    draws the faults by seed and causes them one after the other
report      JSON and picture
"""
