"""Choose among Tritons: which variant answers a question, and which Triton of it.

variants       what the operator says of each variant, and which of them a caller gets; pure
breaker        keep requests from a Triton that fails; pure
retry_budget   limit how many calls are made again; pure
balance        choose the least loaded Triton, and leave out those that are slow; pure
pool           one variant's Tritons as one vision model and one LLM
store          the variants in a file or in Redis, and their changes
fleet          all variants of a running gateway
"""
