"""Say what each dashboard shows. Metrics are declared in service/telemetry/metrics.py and triton_models/gauges.py."""

from __future__ import annotations

from deploy.grafana.panels import CPU_PRICE, Dashboard, Panel, Query, Unit

RATE = "[$__rate_interval]"


# Histograms whose buckets name a trace: service/record/outcomes.py.
WITH_EXEMPLARS = ("glimpse_time_to_first_token_seconds", "glimpse_e2e_request_latency_seconds")


def quantiles(metric: str, *by: str, shares: tuple[float, ...] = (0.5, 0.95, 0.99)) -> list[Query]:
    """Estimate quantiles of a histogram from its buckets, for each value of the labels `by`."""
    labels = ", ".join(("le", *by))
    named = "".join(f" {{{{{label}}}}}" for label in by)
    return [
        Query(
            f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{RATE})))",
            f"p{share * 100:g}{named}",
            exemplars=metric in WITH_EXEMPLARS and share == shares[-1],
        )
        for share in shares
    ]


def mean(metric: str, legend: str) -> Query:
    return Query(f"sum(rate({metric}_sum{RATE})) / sum(rate({metric}_count{RATE}))", legend)


def rates(metric: str, *by: str, where: str = "") -> Query:
    """Events a second by these labels."""
    labels = ", ".join(by)
    return Query(f"sum by ({labels}) (rate({metric}{where}{RATE}))", " ".join(f"{{{{{label}}}}}" for label in by))


def burn_rates(missed: str, budget: float) -> list[Query]:
    return [Query(f"glimpse:{missed}:ratio_rate{window} / {budget}", window) for window in ("5m", "1h", "6h", "3d")]


def number(title: str, expression: str, unit: Unit, about: str) -> Panel:
    return Panel(title, [Query(expression, "")], unit, about, kind="number", width=6)


OVERVIEW = Dashboard(
    "glimpse-overview",
    "Glimpse: overview",
    "Whether callers are served, and whether the objectives hold: 99.9 % of requests answered, 95 % of first tokens "
    "within 500 ms.",
    [
        number("Answers a second", f'sum(rate(glimpse_requests_total{{outcome="ok"}}{RATE}))', "reqps", "Now."),
        number(
            "Requests missed, 1 h",
            "glimpse:availability_missed:ratio_rate1h",
            "percentunit",
            "Requests that the service could have answered and did not. The objective is at most 0.1 %.",
        ),
        number(
            "First tokens after 500 ms, 1 h",
            "glimpse:first_token_missed:ratio_rate1h",
            "percentunit",
            "The objective is at most 5 %.",
        ),
        number("Ready gateways", "sum(glimpse_ready)", "none", "Gateways whose every model answers."),
        Panel(
            "Questions by outcome",
            [rates("glimpse_requests_total", "outcome")],
            "reqps",
            "ok, or the code of an error. Codes are in service/core/errors.py.",
            kind="stacked",
        ),
        Panel("Time to first token", quantiles("glimpse_time_to_first_token_seconds"), "s", "Of streamed answers."),
        Panel(
            "Burn rate of availability",
            burn_rates("availability_missed", 0.001),
            "short",
            "1 spends the error budget of 30 days in 30 days. 14.4 over 5 m and 1 h pages.",
        ),
        Panel(
            "Burn rate of first tokens",
            burn_rates("first_token_missed", 0.05),
            "short",
            "1 spends the budget of 30 days in 30 days. 14.4 over 5 m and 1 h pages.",
        ),
        Panel(
            "Waiting requests",
            [Query("sum by (kind) (glimpse_requests_waiting)", "{{kind}}")],
            "short",
            "For a vision slot or for the LLM.",
            kind="stacked",
        ),
        Panel(
            "Refusals by reason",
            [rates("glimpse_refusals_total", "reason")],
            "reqps",
            "For lack of capacity, or because a tenant holds its share.",
            kind="stacked",
        ),
        Panel(
            "Level of elastic fidelity",
            [Query("max by (instance) (glimpse_fidelity_level)", "{{instance}}")],
            "short",
            "0 looks as closely as requested, 4 least closely.",
        ),
        Panel(
            "Models that answer",
            [Query("min by (model) (glimpse_model_ready)", "{{model}}")],
            "short",
            "1 if every gateway gets answers from the model.",
        ),
    ],
)

STAGES = "glimpse_stage_seconds"
TOP_STAGES = 'stage=~"queue|load|vision|prefill|decode|generate"'
INNER_STAGES = 'stage!~"queue|load|vision|prefill|decode|generate"'
REQUEST_LIFE = Dashboard(
    "glimpse-request-life",
    "Glimpse: a request's life",
    "Where the time of answered questions goes, stage by stage.",
    [
        Panel(
            "Mean time in each stage",
            [
                Query(
                    f"sum by (stage) (rate({STAGES}_sum{{{TOP_STAGES}}}{RATE})) "
                    f"/ on () group_left () sum(rate(glimpse_e2e_request_latency_seconds_count{RATE}))",
                    "{{stage}}",
                )
            ],
            "s",
            "Stacked: together they are nearly the mean latency. A stage that a question does not have counts as 0. "
            "prefill and decode are of streamed answers, generate is of others.",
            kind="stacked",
            width=24,
        ),
        Panel(
            "Inside load and vision",
            [
                Query(
                    f"sum by (stage) (rate({STAGES}_sum{{{INNER_STAGES}}}{RATE})) "
                    f"/ sum by (stage) (rate({STAGES}_count{{{INNER_STAGES}}}{RATE}))",
                    "{{stage}}",
                )
            ],
            "s",
            "Mean of the questions that had the stage: decoding, cache lookup, see or encode, attend.",
        ),
        Panel(
            "Each stage, p95",
            quantiles(STAGES, "stage", shares=(0.95,)),
            "s",
            "Of the questions that had the stage.",
        ),
        Panel("Whole answer", quantiles("glimpse_e2e_request_latency_seconds"), "s", "From arrival to the end."),
        Panel(
            "Wait for grants, p95",
            quantiles("glimpse_request_queue_time_seconds", "kind", shares=(0.95,)),
            "s",
            "For vision slots and for the LLM, by kind of request.",
        ),
        Panel(
            "In flight",
            [
                Query("sum(glimpse_requests_in_flight)", "admitted"),
                Query("sum by (kind) (glimpse_requests_running)", "running: {{kind}}"),
                Query("sum(glimpse_concurrency_limit)", "concurrency limit"),
            ],
            "short",
            "The limit falls if requests miss their deadlines.",
        ),
        Panel(
            "Event loop lag, p99",
            quantiles("glimpse_event_loop_lag_seconds", "instance", shares=(0.99,)),
            "s",
            "Above 0.1 s one piece of work holds up all requests.",
        ),
    ],
)

VISION = Dashboard(
    "glimpse-vision",
    "Glimpse: vision",
    "How closely images are looked at, and what the caches save.",
    [
        Panel(
            "Vision tokens an image",
            [*quantiles("glimpse_vision_tokens", shares=(0.5, 0.95)), mean("glimpse_vision_tokens", "mean")],
            "short",
            "Kept by the relevance allocator, 64 to 400.",
        ),
        Panel(
            "Visual tokens an image",
            [*quantiles("glimpse_visual_tokens", shares=(0.5, 0.95)), mean("glimpse_visual_tokens", "mean")],
            "short",
            "Sent to the LLM, 32 to 128.",
        ),
        Panel(
            "Evenness of relevance",
            [*quantiles("glimpse_relevance_entropy_ratio", shares=(0.1, 0.5, 0.9))],
            "percentunit",
            "Entropy of the relevance map over that of a uniform map. Near 1, the question singles nothing out.",
        ),
        Panel(
            "Tensions, median",
            quantiles("glimpse_tension_ratio", "tension", shares=(0.5,)),
            "percentunit",
            "How the allocator balanced: spend more, spread more, repeat less.",
        ),
        Panel(
            "Images by detail",
            [rates("glimpse_images_seen_total", "detail")],
            "ops",
            "high is with a closer view.",
            kind="stacked",
        ),
        Panel(
            "Answers that looked less closely",
            [
                Query(
                    f"sum(rate(glimpse_reduced_answers_total{RATE})) "
                    f'/ sum(rate(glimpse_requests_total{{outcome="ok"}}{RATE}))',
                    "reduced",
                )
            ],
            "percentunit",
            "Because of load: elastic fidelity.",
        ),
        Panel(
            "Feature lookups by tier",
            [rates("glimpse_feature_cache_lookups_total", "tier", "result")],
            "ops",
            "Redis is asked only if memory has nothing. shared waited for another request's encode.",
            kind="stacked",
        ),
        Panel(
            "Images not encoded again",
            [
                Query("glimpse:feature_cache_hits:ratio_rate30m", "features, 30 m"),
                Query(
                    f'sum(rate(glimpse_visual_cache_lookups_total{{result="hit"}}{RATE})) '
                    f"/ sum(rate(glimpse_visual_cache_lookups_total{RATE}))",
                    "visual tokens",
                ),
            ],
            "percentunit",
            "Share of lookups that a cache answered.",
        ),
        Panel(
            "Cached bytes",
            [
                Query("sum by (tier) (glimpse_feature_cache_bytes)", "features: {{tier}}"),
                Query("sum(glimpse_visual_cache_bytes)", "visual tokens"),
            ],
            "bytes",
            "For Redis all memory that it uses, as each gateway sees it.",
        ),
        Panel(
            "Evictions",
            [
                rates("glimpse_feature_cache_evictions_total", "tier"),
                Query(f"sum(rate(glimpse_visual_cache_evictions_total{RATE}))", "visual tokens"),
            ],
            "ops",
            "A cache that evicts all the time is too small for the traffic.",
        ),
        Panel(
            "Redis lookup",
            quantiles("glimpse_redis_lookup_seconds"),
            "s",
            "What Redis costs a question that asks it.",
        ),
        Panel(
            "Redis in use",
            [Query("1 - glimpse_redis_breaker_open", "{{instance}}")],
            "short",
            "0 while the breaker keeps requests away from Redis.",
        ),
    ],
)

LANGUAGE = Dashboard(
    "glimpse-llm",
    "Glimpse: LLM",
    "The in-flight batcher of the LLM, and tokens.",
    [
        Panel(
            "Tokens a second",
            [
                Query(f"sum(rate(glimpse_generated_tokens_total{RATE}))", "generated"),
                Query(f"sum(rate(glimpse_prompt_tokens_total{RATE}))", "prompt text"),
                Query(f"sum(rate(glimpse_visual_tokens_sum{RATE}))", "visual"),
            ],
            "short",
            "As the gateways count them, for questions of any outcome; visual tokens of answered ones.",
        ),
        Panel(
            "Between two tokens",
            quantiles("glimpse_inter_token_latency_seconds"),
            "s",
            "Of answers; tokens of one response share its time.",
        ),
        Panel(
            "Sequences",
            [Query("sum by (state) (glimpse_llm_sequences)", "{{state}}")],
            "short",
            "In the running batch and in the LLM's own queue.",
            kind="stacked",
        ),
        Panel(
            "Mean batch",
            [
                Query(
                    f"sum(rate(glimpse_llm_tokens_total{RATE})) / sum(rate(glimpse_llm_iterations_total{RATE}))",
                    "tokens",
                )
            ],
            "short",
            "Tokens for each run of the decoder.",
        ),
        Panel(
            "Prefix cache",
            [
                Query(f"sum(rate(glimpse_llm_prefix_hits_total{RATE}))", "hits a second"),
                Query(f"sum(rate(glimpse_llm_prefix_tokens_total{RATE}))", "tokens saved a second"),
            ],
            "ops",
            "Prompts whose first tokens were computed before.",
        ),
        Panel(
            "Prefix cache, bytes",
            [Query("sum(glimpse_llm_prefix_bytes)", "keys and values")],
            "bytes",
            "Bounded by prefix_cache_bytes in llm/config.pbtxt.",
        ),
        Panel(
            "LLM tokens granted",
            [
                Query('sum(glimpse_resource_used{resource="llm"})', "granted"),
                Query('sum(glimpse_admitted_cost{unit="tokens"})', "admitted"),
            ],
            "short",
            "Of requests that run, and of all that were let in.",
        ),
    ],
)

ANSWERS = f'sum(rate(glimpse_requests_total{{outcome="ok"}}{RATE}))'
NO_ENSEMBLE = '{model!~"see|attend.*|vqa"}'
CPU = f"sum(rate(glimpse_cpu_seconds_total{RATE}))"
CAPACITY = Dashboard(
    "glimpse-capacity",
    "Glimpse: capacity and cost",
    "What the service takes for what it gives. CPU seconds are those of the gateways with their decoders and embedded "
    "Tritons. For Tritons in pods of their own, add container_cpu_usage_seconds_total of the kubelet.",
    [
        number("Answers a second", ANSWERS, "reqps", "Now."),
        number(
            "CPU seconds a thousand answers",
            f"1000 * {CPU} / {ANSWERS}",
            "s",
            "Of gateways, decoders and embedded Tritons.",
        ),
        number(
            "Price of a thousand answers",
            f"1000 * {CPU} / {ANSWERS} / 3600 * ${CPU_PRICE}",
            "short",
            "CPU time at the price in the head of this page.",
        ),
        number(
            "Visual tokens an answer",
            f"sum(rate(glimpse_visual_tokens_sum{RATE})) / {ANSWERS}",
            "short",
            "Fewer are cheaper in the LLM.",
        ),
        Panel(
            "CPU cores in use",
            [
                Query(f"sum by (instance) (rate(glimpse_cpu_seconds_total{RATE}))", "{{instance}}: all"),
                Query(
                    f'sum by (instance) (rate(process_cpu_seconds_total{{job="glimpse"}}{RATE}))',
                    "{{instance}}: gateway",
                ),
            ],
            "short",
            "The gateway's process alone, and with decoders and its embedded Triton.",
        ),
        Panel(
            "Time in models, a thousand answers",
            [
                Query(
                    f"1000 * sum by (model) (rate(nv_inference_compute_infer_duration_us{NO_ENSEMBLE}{RATE})) "
                    f"/ 1e6 / on () group_left () {ANSWERS}",
                    "{{model}}",
                )
            ],
            "s",
            "Seconds that Triton's models computed, without the ensembles, which count their parts again. The LLM's "
            "requests overlap in one batch, so its time is not CPU time.",
            kind="stacked",
        ),
        Panel(
            "CPU by tenant",
            [Query(f"sum by (tenant) (rate(glimpse_tenant_cpu_seconds_total{RATE}))", "{{tenant}}")],
            "short",
            "Cores of gateways, decoders and models. (service) is start, probes and idle time.",
            kind="stacked",
        ),
        Panel(
            "Price an hour by tenant",
            [
                Query(
                    f"sum by (tenant, variant) (rate(glimpse_tenant_cpu_seconds_total{RATE})) * ${CPU_PRICE}",
                    "{{tenant}}, {{variant}}",
                )
            ],
            "short",
            "CPU time at the price in the head of this page. `glimpse cost` has a table of any time, GPUs too.",
            kind="stacked",
        ),
        Panel(
            "CPU by part",
            [Query(f"sum by (part) (rate(glimpse_tenant_cpu_seconds_total{RATE}))", "{{part}}")],
            "short",
            "Cores of the gateway, its decoders, each model, and triton, the server itself.",
            kind="stacked",
        ),
        Panel(
            "GPU by tenant",
            [Query(f"sum by (tenant) (rate(glimpse_tenant_gpu_seconds_total{RATE})) or vector(0)", "{{tenant}}")],
            "short",
            "GPUs that models of the python backend kept busy; 0 if no model ran on one.",
            kind="stacked",
        ),
        Panel(
            "Answers by tenant",
            [Query(f'sum by (tenant) (rate(glimpse_tenant_requests_total{{outcome="ok"}}{RATE}))', "{{tenant}}")],
            "reqps",
            "The tenants that ask most have a label of their own.",
            kind="stacked",
        ),
        Panel(
            "Tokens by tenant",
            [Query(f"sum by (tenant, kind) (rate(glimpse_tenant_tokens_total{RATE}))", "{{tenant}}: {{kind}}")],
            "short",
            "Prompt, visual and generated tokens a second.",
            kind="stacked",
        ),
        Panel(
            "Admitted cost",
            [Query("sum by (unit) (glimpse_admitted_cost)", "{{unit}}")],
            "short",
            "What all requests in flight hold of the quotas: bytes, pixels, tokens.",
        ),
        Panel(
            "Granted resources",
            [Query("sum by (resource) (glimpse_resource_used)", "{{resource}}")],
            "short",
            "Images in the vision stage, tokens in the LLM.",
        ),
        Panel(
            "Memory of the gateways",
            [Query('sum by (instance) (process_resident_memory_bytes{job="glimpse"})', "{{instance}}")],
            "bytes",
            "The gateway's process, without decoders and Triton.",
        ),
        Panel(
            "Tokens saved by cancelling",
            [rates("glimpse_tokens_saved_total", "reason")],
            "short",
            "Most tokens that questions did not generate because the caller left or the deadline passed.",
        ),
        Panel(
            "HTTP requests by status",
            [rates("glimpse_http_requests_total", "route", "status")],
            "reqps",
            "Every route, health and metrics too.",
            kind="stacked",
        ),
    ],
)

TRITON = Dashboard(
    "glimpse-triton",
    "Glimpse: Triton",
    "Triton's own metrics, by model.",
    [
        Panel("Inferences", [rates("nv_inference_count", "model")], "ops", "Rows, not batches.", kind="stacked"),
        Panel(
            "Mean batch",
            [
                Query(
                    f"sum by (model) (rate(nv_inference_count{RATE})) "
                    f"/ (sum by (model) (rate(nv_inference_exec_count{RATE})) > 0)",
                    "{{model}}",
                )
            ],
            "short",
            "Rows for each execution. The LLM batches inside itself: see the dashboard of the LLM.",
        ),
        Panel(
            "Mean time in the queue",
            [
                Query(
                    f"sum by (model) (rate(nv_inference_queue_duration_us{RATE})) / 1e6 "
                    f"/ (sum by (model) (rate(nv_inference_request_success{RATE})) > 0)",
                    "{{model}}",
                )
            ],
            "s",
            "Between Triton's front and the model.",
        ),
        Panel(
            "Mean time of an execution",
            [
                Query(
                    f"sum by (model) (rate(nv_inference_compute_infer_duration_us{RATE})) / 1e6 "
                    f"/ (sum by (model) (rate(nv_inference_exec_count{RATE})) > 0)",
                    "{{model}}",
                )
            ],
            "s",
            "Of one batch.",
        ),
        Panel(
            "Pending requests",
            [Query("sum by (model) (nv_inference_pending_request_count)", "{{model}}")],
            "short",
            "Accepted and not yet executed.",
        ),
        Panel(
            "Failures",
            [rates("nv_inference_request_failure", "model", "reason")],
            "ops",
            "CANCELED is a caller that went away.",
        ),
        Panel(
            "CPU of the machine",
            [Query("avg by (instance) (nv_cpu_utilization)", "{{instance}}")],
            "percentunit",
            "All processes of the machine, as Triton sees it.",
        ),
        Panel(
            "Memory of the machine",
            [
                Query("sum by (instance) (nv_cpu_memory_used_bytes)", "{{instance}}: used"),
                Query("sum by (instance) (nv_cpu_memory_total_bytes)", "{{instance}}: all"),
            ],
            "bytes",
            "All processes of the machine.",
        ),
    ],
)

VARIANTS = Dashboard(
    "glimpse-variants",
    "Glimpse: variants",
    "What each variant answers, how fast, and which of their Tritons are out. Without variants there is one, default.",
    [
        Panel(
            "Answers by variant",
            [Query(f'sum by (variant) (rate(glimpse_requests_total{{outcome="ok"}}{RATE}))', "{{variant}}")],
            "reqps",
            "Of the variant that answered, fallbacks included.",
            kind="stacked",
        ),
        Panel(
            "Failures by variant",
            [
                Query(
                    f'sum by (variant, outcome) (rate(glimpse_requests_total{{outcome!="ok"}}{RATE}))',
                    "{{variant}} {{outcome}}",
                )
            ],
            "reqps",
            "Of the variant that was asked last.",
        ),
        Panel(
            "First token by variant",
            quantiles("glimpse_time_to_first_token_seconds", "variant", shares=(0.5, 0.95)),
            "s",
            "Of answered questions, time at variants that failed before included.",
        ),
        Panel(
            "Whole answer by variant",
            quantiles("glimpse_e2e_request_latency_seconds", "variant", shares=(0.5, 0.95)),
            "s",
            "From arrival to the end.",
        ),
        Panel(
            "Fallbacks by variant and reason",
            [rates("glimpse_fallbacks_total", "variant", "reason")],
            "reqps",
            "Questions of this variant that another one got: its Tritons were out, a call failed, or it was late.",
            kind="stacked",
        ),
        Panel(
            "Weights",
            [Query("max by (variant) (glimpse_variant_weight)", "{{variant}}")],
            "short",
            "0 while a variant drains, and for one that only testers get.",
        ),
        Panel(
            "Questions in flight by variant",
            [Query("sum by (variant) (glimpse_variant_requests_in_flight)", "{{variant}}")],
            "short",
            "A variant that drains has ended when it is 0.",
        ),
        Panel(
            "Tritons that get requests",
            [Query("min by (variant, upstream) (glimpse_upstream_ready)", "{{variant}} {{upstream}}")],
            "short",
            "1 if every gateway sends requests to it.",
        ),
        Panel(
            "Calls to each Triton by outcome",
            [rates("glimpse_upstream_calls_total", "variant", "upstream", "outcome")],
            "ops",
            "left: the caller went away, or its own time was over.",
        ),
        Panel(
            "Calls made again",
            [rates("glimpse_upstream_retries_total", "variant", "result")],
            "ops",
            "At another Triton of the variant. refused: the retry budget was used up.",
        ),
    ],
)

DASHBOARDS = (OVERVIEW, REQUEST_LIFE, VISION, LANGUAGE, CAPACITY, TRITON, VARIANTS)
