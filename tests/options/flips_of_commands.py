"""Flips of what single commands read: paths, export, evaluate, generate, benchmark, convert."""

from tests.options.flip import Flip, each, items

RUN = ("run=@run@",)
TASKS = ("command=evaluate", *RUN, "evaluate.tasks=[t]")
BENCHMARK = ("command=benchmark", "benchmark.baselines=[ternary]", "benchmark.rounds=2", "benchmark.warmup=1",
             "benchmark.memory=false", "trainer.micro_batch=2", "run_name=measured")  # fmt: skip
LAYERS = (*BENCHMARK, "benchmark.what=layers", "benchmark.shapes=[[32,32]]", "benchmark.tokens=[8]")
CONVERT = ("command=convert", "convert.from=@llama@", "convert.to=@new@")

FLIPS: dict[str, Flip] = {
    "command": Flip("command=estimate", see="command"),
    "run_name": Flip("run_name=other", ("run_name=one",), see="folders"),
    "run": Flip("run=@llama_run@", ("command=generate", *RUN), see="command"),
    **each({"runs": "@new@/runs", "data": "@new@/data"}, "run_name=one", under="paths.", see="folders"),
    "resume": Flip("resume.from=@run@@3"),
    **each({"formats": "[packed]", "dtype": "bfloat16", "linear_class": "bitlinear", "license": "mit",
            "verify_tokens": "512"}, "command=export", *RUN, "export.formats=[hf-packed]", under="export.",
           see="exported"),
    "export.to": Flip("export.to=memory://exports", ("command=export", *RUN, "export.formats=[packed]"), see="command"),
    **each({"embedding": "q8_0"}, "command=export", "run=@wide_run@", "export.formats=[gguf-i2_s]", under="export.",
           see="exported"),
    **each({"packing": "two_bit"}, "command=export", *RUN, "export.formats=[packed]", under="export.", see="exported"),
    **each({"gpus": "[8,64]", "gpu": "a100", "gpus_per_node": "4", "matmul_share": "0.5", "memory_share": "0.5",
            "network_share": "0.5"}, "command=estimate", "estimate.gpus=[8]", under="estimate.", see="command"),
    **each({"prompt": "line", "max_new_tokens": "9", "temperature": "0.1", "top_k": "2", "top_p": "0.2", "min_p": "0.5",
            "stop": "[e]", "samples": "2", "prompts_file": "@prompts@", "seed": "3"},
           "command=generate", *RUN, "generate.max_new_tokens=24", under="generate.", see="command"),
    **each({"text": "@prompts@", "window": "8"}, "command=evaluate", *RUN, under="evaluate.", see="command"),
    **each({"tasks": "[u]", "task_folder": "@other@", "shots": "2", "limit": "3"}, *TASKS, under="evaluate.",
           see="harness"),
    "evaluate.every_steps": Flip("evaluate.every_steps=2", ("evaluate.tasks=[t]",), see="harness"),
    **each({"what": "layers", "baselines": "[dense]", "warmup": "2", "rounds": "3", "memory": "true",
            "profile": "true"}, *BENCHMARK, under="benchmark.", see="benchmarked"),
    **items({"name": "[{name: y, overrides: [clip=none]}]", "overrides": "[{name: x, overrides: [seed=7]}]"},
            "[{name: x, overrides: [clip=none]}]", *BENCHMARK, under="benchmark.variants", see="benchmarked"),
    **each({"shapes": "[[32,64]]", "tokens": "[16]"}, *LAYERS, under="benchmark.", see="benchmarked"),
    **each({"to": "@new2@", "from": "@llama2@", "include": "['*q_proj']", "exclude": "['*q_proj', lm_head]",
            "tokens": "64", "text": "@prompts@"}, *CONVERT, under="convert.", see="converted"),
}  # fmt: skip
