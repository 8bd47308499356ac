"""Decide which requests are admitted, when they run, and how closely they look at images.

All modules except `admission` and `batch_turns` are pure: `now` is an argument.

    request ─► Quota ─► Claim ─► ConcurrencyLimit ─► tenants ─► order ─► granted ─► over
               429       429      waits               fairness   kind, age

A request meets these checks, in this order:

1. **Quota** (`quota.py`): bytes, pixels and tokens are reserved before any work, against limits for the process and a
   share for each tenant. No room: 429 `saturated` or `tenant_share`; a stopping process: 503 `shutting_down`.
2. **Queue time** (`scheduler.py`): a claim on vision slots or LLM tokens whose estimated queue time
   (`drain_rate.py`) leaves too little of its `timeout_s` is refused: 429 `deadline`.
3. **Concurrency limit** (`concurrency_limit.py`): a request's first claim waits until one more request may be in
   service. It is refused only if that wait leaves too little of its `timeout_s` (429 `deadline`). Missed deadlines
   narrow the limit, answers widen it (AIMD).
4. **Fairness between tenants, then order** (`scheduler.py`): the tenant that holds the least goes first. Inside a
   tenant the cheapest kind goes first, but older claims gain rank.
5. **Fidelity** (`fidelity.py`): the level in force caps the tokens of a granted request. It follows the longest wait,
   in the queue (`Scheduler.waiting_since`) or by contention (`contention.py`). It rises before requests are refused.

A claim is *waiting* (submitted), then *granted* (it holds its amount), then *over* (released). It may be *refused*
before it waits, or *expire* while it waits.

Owners:

    admission.py          Admission, Reservation: asyncio around the rest; a Reservation is all that one request holds
    quota.py              Quota: what is reserved, by process and tenant
    scheduler.py          Scheduler: the two resources, their queues, what is granted
    contention.py         Contention: the one register of requests in service, the one estimate of an answer's own time
    concurrency_limit.py  ConcurrencyLimit: how many may be in service
    fidelity.py           Fidelity: the level in force
    drain_rate.py         DrainRate: how fast units of a resource come free
    batch_turns.py        BatchTurns: how many questions of one tenant's batches may be in work, before all of the above
"""
