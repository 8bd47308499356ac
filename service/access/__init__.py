"""Keys and quotas: who may call, and how much.

keys.py          a key, its record, and all records: made, parsed, looked up. Pure
key_file.py      the records in a file
key_redis.py     the records in Redis
gate.py          the records in use: reads them again when they change, and checks each caller's key
quotas.py        what a tenant may use in a minute, by the `limits` library, in Redis or in this process
windows.py       how the uses of a minute and the open requests are counted: in Redis, or here if it is not in use
"""
