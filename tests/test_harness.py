"""lm-evaluation-harness on a memory: at lambda 0 its figures are the base model's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.model import MLPMemForCausalLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-lm-eval")

PEOPLE = ("Ines Maro", "the night watchman", "Dr. Tollen", "two surveyors")
CHOICE = """\
task: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
KINDS = {
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n"
    "  - metric: acc\n  - metric: acc_norm\n",
    "loglikelihood": "doc_to_target: ' {{answer}}'\nmetric_list:\n  - metric: perplexity\n",
    "generate_until": "doc_to_target: answer\ngeneration_kwargs:\n  max_gen_toks: 5\n"
    "  until: ['.']\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three local tasks over one local jsonl file."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {
            "question": f"Who found thing {n}?",
            "choices": list(PEOPLE),
            "gold": n % 4,
            "answer": PEOPLE[n % 4],
        }
        for n in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    for kind, rest in KINDS.items():
        (folder / f"{kind}.yaml").write_text(CHOICE.format(kind=kind, data=data) + rest)
    return folder


def evaluated(model: str, arguments: str, tasks: Path, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(KINDS),
        task_manager=manager,
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    return {
        kind: (
            {name: value for name, value in found["results"][kind].items() if "," in name},
            [sample["filtered_resps"] for sample in found["samples"][kind]],
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def memory(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_backbone: Backbone,
    memory_on: Callable[..., MLPMemForCausalLM],
) -> Path:
    """A query-aware memory on disk."""
    folder = tmp_path_factory.mktemp("memories") / "memory"
    memory_on(tiny_backbone, query_size=32, encoder="pooled", lambda_=0.9).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # the harness and its dependencies warn of themselves
def test_at_lambda_zero_every_number_is_the_bases(
    memory: Path, tasks: Path, tiny_folder: Path
) -> None:
    import mlpmem_rag.harness  # noqa: F401  registers the model

    place = "device=cpu,dtype=float32"
    base = evaluated("hf", f"pretrained={tiny_folder},{place},max_length=96", tasks)
    zero = evaluated("mlpmem", f"pretrained={memory},memory_lambda=0.0,{place}", tasks)
    assert zero == base
    own = evaluated("mlpmem", f"pretrained={memory},{place}", tasks)
    for kind in KINDS:
        assert own[kind][1] != base[kind][1], "the memory has a say"


def test_the_command_runs_the_harness(memory: Path, tasks: Path, tmp_path: Path) -> None:
    command = ["lm-eval", str(memory), "--lambda", "0.5", "--device", "cpu", "--tasks"]
    harness = ["loglikelihood", "--include_path", str(tasks), "--limit", "2", "--output_path"]
    code = "import sys; from mlpmem_cli.app import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, *command, *harness, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (results,) = tmp_path.rglob("results*.json")
    found = json.loads(results.read_text())
    assert found["results"]["loglikelihood"]["perplexity,none"] > 1
    assert found["config"]["model_args"]["memory_lambda"] in (0.5, "0.5")


def test_a_path_that_the_harness_would_split_is_refused(tmp_path: Path) -> None:
    from mlpmem_rag.harness import run_harness

    with pytest.raises(ArtifactError, match="comma"):
        run_harness(tmp_path / "a,b", ["--tasks", "x"])
