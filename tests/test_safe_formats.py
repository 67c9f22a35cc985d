"""Nothing that `anchor` loads is ever unpickled."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
import torch

from anchor_cli.base.errors import InputError

PACKAGE = Path(__file__).parents[1] / "anchor_cli"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    ("torch", "load"), ("torch", "save"), ("dist", "broadcast_object_list"), ("dist", "all_gather_object"),
    ("dist", "gather_object"), ("dist", "scatter_object_list"), ("dist", "send_object_list"),
    ("engine", "load_checkpoint"), ("engine", "save_checkpoint"), ("pd", "read_pickle"), ("pandas", "read_pickle"),
}  # fmt: skip


def unsafe(source: str) -> list[str]:
    """What in a module could unpickle a file or a message of another process, or ask a library to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module)] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            found += [f"{name}.{node.func.attr}"] if (name, node.func.attr) in CALLS else []
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += ["allow_pickle"] if given.get("allow_pickle", "False") != "False" else []
            found += ["trust_remote_code"] if given.get("trust_remote_code", "False") != "False" else []
            if node.func.attr == "from_pretrained" and name == "AutoModelForCausalLM":
                found += [] if given.get("use_safetensors") == "True" else ["from_pretrained without use_safetensors"]
    return found


def test_the_search_finds_what_it_is_for() -> None:
    assert unsafe("import torch\ntorch.load('x')") == ["torch.load"]
    assert unsafe("from pickle import loads") == ["pickle"]
    assert unsafe("import numpy as np\nnp.load(p, allow_pickle=True)") == ["allow_pickle"]
    assert unsafe("torch.distributed.broadcast_object_list(x)") == []
    assert unsafe("dist.broadcast_object_list(x)") == ["dist.broadcast_object_list"]
    assert unsafe("AutoModelForCausalLM.from_pretrained(x)") == ["from_pretrained without use_safetensors"]


def test_no_module_unpickles_anything() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 50
    found = {str(path.relative_to(PACKAGE)): unsafe(path.read_text(encoding="utf-8")) for path in modules}
    assert {name: what for name, what in found.items() if what} == {}


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_model_folder_with_pickled_weights_is_refused_unread(small_model: Path, tmp_path: Path, name: str) -> None:
    from anchor_cli.model.backbone import load_backbone

    folder, mark = tmp_path / "model", tmp_path / "was-unpickled"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((small_model / file).read_bytes())
    payload = pickle.dumps(Payload(mark))
    pickle.loads(payload)
    assert mark.exists()  # the payload works
    mark.unlink()
    (folder / name).write_bytes(payload)
    with pytest.raises(InputError, match="pickled weights"):
        load_backbone(folder, dtype=torch.float32)
    assert not mark.exists()


def test_a_resumed_run_looks_at_safetensors_and_json_only(tmp_path: Path) -> None:
    """A pickle slipped into a checkpoint is not opened: the manifest names what belongs there."""
    from anchor_cli.base.checkpoints import newest_whole
    from anchor_cli.train.saving import commit

    mark = tmp_path / "was-unpickled"
    partial = tmp_path / ".checkpoint-1.partial"
    partial.mkdir()
    (partial / "training_state.json").write_text("{}")
    commit(partial, tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1/optimizer.pt").write_bytes(pickle.dumps(Payload(mark)))
    found, damaged = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-1" and not damaged
    assert not mark.exists()
