"""Two processes distil as one does: the same losses, gradients, weights and evaluation; also with sharded weights."""

import json

import pytest

from ..helpers import distillation_processes
from ..helpers.warm_processes import run_two_processes
from .test_trainer import KINDS, TERMS, examples, pad, train, trainer_of


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return what two processes have found."""
    folder = tmp_path_factory.mktemp("processes")
    run_two_processes(distillation_processes.work, folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, found, tmp_path) -> None:
    """Evaluation is of seven examples, which two processes cannot share evenly."""
    single = train(examples(), tmp_path, per_device_eval_batch_size=2, **KINDS[kind])
    metrics = single.evaluate()
    shared = found[kind]
    for mine, theirs in zip(single.state.log_history, shared["history"], strict=True):
        for name in {"loss", "grad_norm", "divergence", "cross_entropy", "hidden_states", "diversity"} & set(mine):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name
    for name, parameter in single.model.named_parameters():
        assert shared["weights"][name] == pytest.approx(parameter.double().sum().item(), rel=1e-4, abs=1e-4)
    for name in ("eval_loss", "eval_divergence", "eval_cross_entropy"):
        assert shared["metrics"][name] == pytest.approx(metrics[name], rel=1e-4)


def test_sharded_student_and_teacher_equal_whole_ones(found, tmp_path) -> None:
    """FSDP2: both heads, whose weights are shards outside of the forward pass, are whole where the loss is computed."""
    data = examples()
    trainer = trainer_of(data, tmp_path, **TERMS)
    trainer.compute_loss(trainer.model, pad([data[i] for i in range(8)]), num_items_in_batch=100).backward()
    for name, parameter in trainer.model.named_parameters():
        assert found["sharded"][name] == pytest.approx(parameter.grad.double().square().sum().item(), rel=1e-3), name
