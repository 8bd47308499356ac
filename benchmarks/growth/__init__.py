"""Cost against size: latency, requests a second and CPU seconds along one axis at a time.

    python -m benchmarks.growth

curves      what is measured along an axis, at which sizes, in which order
served      questions over HTTP to a gateway and its Triton
tenants     the same for many tenants, each time to a gateway that has met no other
in_process  tables of the gateway alone, with more entries than real encodes could fill
order       the order of growth of a curve, with its interval
report      JSON, text and picture
"""
