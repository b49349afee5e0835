"""Tasks of lm-evaluation-harness during training: a line every so many steps, and training does not notice."""

import json

from tests.training.conftest import Workspace

TASK = """
task: mini
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mini.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["a", "b"]
metric_list: [{metric: acc}]
"""


def test_scores_come_every_so_many_steps_and_change_nothing(workspace: Workspace) -> None:
    folder = workspace.folder / "tasks"
    folder.mkdir()
    rows = [{"question": f"what {i}", "answer": i % 2} for i in range(6)]
    (folder / "mini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mini.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    tasks = ("evaluate.tasks=[mini]", f"evaluate.task_folder={folder}", "evaluate.every_steps=2")
    code, output = workspace.run("run_name=plain", "trainer.max_steps=5")
    assert code == 0, output
    code, output = workspace.run("run_name=asked", "trainer.max_steps=5", *tasks)
    assert code == 0, output
    assert workspace.losses("asked") == workspace.losses("plain")
    file = workspace.folder / "runs" / "asked" / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(0 <= line["results"]["mini"]["acc,none"] <= 1 for line in lines)
    # Continued: the lines past the checkpoint are cut and written again.
    with file.open("a") as stream:
        stream.write(json.dumps({"step": 9, "results": {}}) + '\n{"step": 1')
    code, output = workspace.run("run_name=asked", "trainer.max_steps=6", *tasks)
    assert code == 0, output
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4, 5, 6]
    # The command on the finished run gives the last line's scores, and leaves them in a file.
    code, output = workspace.run("command=evaluate", "run=runs/asked", *tasks[:2])
    assert code == 0, output
    assert "mini" in output
    saved = json.loads((workspace.folder / "runs" / "asked" / "evaluation.json").read_text())
    assert set(saved["tasks"]) == {"mini"}
    code, output = workspace.run("run_name=typo", "evaluate.tasks=[minni]", tasks[1], "evaluate.every_steps=2")
    assert code == 2
    assert "no task 'minni'" in output
