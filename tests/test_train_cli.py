"""`iared2 train` heeds every option, answers every user error with one line, and goes on exactly where it stopped."""

import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import iared2  # noqa: F401 - first: see iared2/_compat.py

# isort: split
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_run
from iared2 import cli
from iared2.errors import ConfigError, TrainingError
from iared2.model import reduce
from iared2.runtime import pick_device
from iared2.train import run as run_module
from iared2.train.checkpoint import Place, latest_checkpoint, save_checkpoint
from iared2.train.optim import OptimSettings
from iared2.train.recipes import Recipe, ReductionSettings, find_recipe
from iared2.train.tasks import BlocksTask, GroupTask, InterpreterTask
from iared2.train.trainer import RunSettings, Stage, Task, Trainer
from iared2.train.warm_start import WarmStartTask

ARGUMENTS = {"img_size": 32, "patch_size": 8, "num_classes": 2}
QUICK = [
    f"backbone.arguments={json.dumps(ARGUMENTS)}",
    "backbone.model=test_vit",
    "reduction.groups=2",
    "reduction.interpreter_epochs=1",
    "reduction.block_epochs=0",
    "data.batch_size=4",
]


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate's settings hold for a whole process; here each test chooses its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for label, shade in (("ants", 40), ("bees", 200)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 36), (shade, shade + 5 * i, 90)).save(tmp_path / "data" / label / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def train(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, list[str]]]:
    """Runs `iared2 train` on a small backbone; gives its exit code and what it complained about."""
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", **ARGUMENTS).state_dict(), weights)

    def train(*arguments: object, output: object = tmp_path / "run", weights: Path = weights) -> tuple[int, list[str]]:
        tokens = ["train", "paper_deit_small", *QUICK, "--data", data, "--weights", weights, "-o", output, "--workers", 0, *arguments]
        code = cli.main([str(token) for token in tokens])
        return code, [line for line in capfd.readouterr().err.splitlines() if line.startswith("iared2: ")]

    return train


def refused(result: tuple[int, list[str]], *words: str) -> None:
    code, lines = result
    assert code == 2, lines
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


# ---- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:63"])
def test_a_device_that_cannot_be_had_is_refused(train, name: str, tmp_path: Path) -> None:
    refused(train("--device", name), f"device: got '{name}'", "try --device cpu")
    assert not (tmp_path / "run").exists()


def test_meta_cannot_compute() -> None:
    with pytest.raises(ConfigError, match="without values"):
        pick_device("meta")


def test_the_named_gpu_becomes_the_current_one_and_accelerate_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(run_module, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    with pytest.raises(ConfigError, match="got 'cuda:1', but Accelerate is set to cpu"):
        run_module.open_accelerator("cuda:1", "no")
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("kind", "version", "lines"),
    [
        (DistributedType.DEEPSPEED, None, ("accelerate: got DEEPSPEED", "unset ACCELERATE_USE_DEEPSPEED")),
        (DistributedType.FSDP, 1, ("accelerate: got FSDP version 1, wanted 2", "set FSDP_VERSION=2")),
    ],
)
def test_weights_divided_in_a_way_that_checkpoints_do_not_hold_are_refused(
    kind: DistributedType, version: int | None, lines: tuple[str, ...], train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: kind))
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", SimpleNamespace(fsdp_version=version), raising=False)
    refused(train("--device", "cpu"), *lines)


def test_fp16_on_a_cpu_is_refused(train) -> None:
    refused(train("--device", "cpu", "--dtype", "float16"), "precision: got fp16 on the CPU", "--dtype bfloat16")


@pytest.mark.parametrize(
    ("options", "precision"),
    [((), "bf16"), (("--dtype", "float32"), "no"), (("--dtype", "bfloat16"), "bf16"), (("--dtype", "float16"), "fp16")],
)
def test_dtype_overrides_the_recipe_only_when_given(monkeypatch: pytest.MonkeyPatch, options: tuple, precision: str) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr(run_module, "train", lambda recipe, _: seen.append(recipe))
    assert cli.main(["train", "mini_reduced", *options]) == 0
    assert seen[0].precision == precision


def test_a_folder_whose_name_is_a_number_stays_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr(run_module, "train", lambda recipe, _: seen.append(recipe))
    assert cli.main(["train", "mini_reduced", "--data", "2024", "--weights", "7"]) == 0
    assert (seen[0].data.train, seen[0].backbone.weights) == ("2024", "7")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=true"], "data.batch_size: Input should be a valid integer (got True)"),
        (["reduction.interpreter_epochs=true"], "interpreter_epochs: Input should be a valid integer"),
        (["data.subset=-5"], "data.subset: Input should be greater than 0 (got -5)"),
        (["data.subset=0"], "data.subset: Input should be greater than 0"),
        (["data.val_subset=0"], "data.val_subset: Input should be greater than 0"),
        (["reduction.block_optim.clip_norm=0"], "clip_norm: Input should be greater than 0"),
        (["reduction.block_optim.betas=[2,3]"], "betas.0: Input should be less than 1 (got 2)"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0 (got -1)"),
        (["reduction.interpreter_epochs=0", "reduction.block_epochs=0"], "nothing would be trained"),
        (
            ["reduction.groups=[0,1]", "reduction.warm_start_ratios=[2,-1]"],
            "warm_start_ratios.0: Input should be less than or equal to 1 (got 2); reduction.warm_start_ratios.1: Input should be greater",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("paper_deit_small", overrides)
    assert message in str(caught.value)


def test_a_reduction_without_epochs_is_no_reduction() -> None:
    with pytest.raises(ValidationError, match="got 0 for all"):
        ReductionSettings(interpreter_epochs=0, block_epochs=0)


def test_backbone_arguments_take_new_keys() -> None:
    recipe = find_recipe("paper_deit_small", ["--backbone.arguments.num_classes=4", "--backbone.arguments.deep.er=1"])
    assert recipe.backbone.arguments == {"num_classes": 4, "deep": {"er": 1}}


# ---- user errors are one line, and no defect --------------------------------------------------------------------


def test_an_output_that_cannot_be_a_folder(train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(train(output=tmp_path / "file"), "the output must be a folder", "this is a file")
    refused(train(output=tmp_path / "file" / "below"), "the output folder cannot be written to", "another name")
    refused(train(output="/proc/zz"), "/proc/zz: the output folder cannot be written to")
    refused(train(output=tmp_path / ("a" * 300)), "the output folder cannot be written to (File name too long)")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments", ['{"foo":1}', '{"num_heads":7}', '{"patch_size":0}'])
def test_arguments_that_timm_does_not_take(train, arguments: str) -> None:
    refused(train(f"--backbone.arguments={arguments}"), "backbone.arguments: got {", "test_vit does not take")


def test_a_backbone_that_timm_does_not_know_is_refused_from_scratch_too() -> None:
    recipe = find_recipe("mini_dense", ["backbone.model=nonesuch"])
    with pytest.raises(ConfigError, match="timm has no model 'nonesuch'"):
        run_module.build_backbone(recipe)


def test_an_optimizer_with_other_betas_is_refused(train) -> None:
    refused(train("reduction.interpreter_optim.optimizer=adan"), "optimizer: got 'adan'")


@pytest.mark.parametrize("name", ["model.safetensors", "place.json", "optimizer.pt"])
def test_a_damaged_checkpoint_names_the_folder_to_delete(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Stopped):
            train("checkpoint_every=1", "--debug")
    checkpoint = latest_checkpoint(tmp_path / "run" / "reduction")
    assert checkpoint is not None and checkpoint.name == "stage00-step00000002"
    (checkpoint / name).write_bytes(b"{half")
    refused(train("checkpoint_every=1"), f"{checkpoint}: a damaged checkpoint", "delete this folder to start over")
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    assert train("checkpoint_every=1") == (0, [])


def test_a_refused_run_leaves_the_record_of_the_run_there(train, tmp_path: Path) -> None:
    assert train("--seed", 1) == (0, [])
    record = (tmp_path / "run" / "recipe.json").read_text()
    refused(train("--seed", 2), f"{tmp_path / 'run' / 'reduction'} holds a run of another recipe")
    refused(train("--seed", 1, weights=tmp_path / "none.safetensors"), "another recipe")
    assert (tmp_path / "run" / "recipe.json").read_text() == record
    refused(train(weights=tmp_path / "none.safetensors", output=tmp_path / "other"), "no such weights file")
    assert not (tmp_path / "other" / "recipe.json").exists()


# ---- runs that diverge ------------------------------------------------------------------------------------------


def test_a_diverging_warm_start_names_stage_and_step(train, tmp_path: Path) -> None:
    options = ["warm_start_epochs=2", "warm_start_ratios=[0.8,0.5]", "warm_start_optim.lr=1e38"]
    refused(train(*(f"reduction.{option}" for option in options)), "stage warm_start-1, step ", "the interpreter's scores are not finite")


@pytest.mark.parametrize("build", [lambda m: WarmStartTask(m, 1, 0.5), lambda m: InterpreterTask(m, 1, ReductionSettings().reward)])
@pytest.mark.parametrize("group", [0, 1])
def test_scores_that_are_not_finite_stop_every_task(build: Callable[..., GroupTask], group: int) -> None:
    """Those of an earlier group too, whose threshold would drop everything without a word."""
    model = reduce(tiny_run.tiny_backbone(), 2)
    task = build(model)
    task.begin()
    with torch.no_grad():
        model.reducers[group].interpreter.query.weight.fill_(float("nan"))
    batch = next(tiny_run.tiny_feeds().train.epoch(0))
    for stopped in (task, BlocksTask(model, 1, train_head=True)):
        with pytest.raises(FloatingPointError, match="scores are not finite"):
            stopped(batch)


class Scaled(Task):
    """A loss whose gradient is `size` throughout."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.ones(1)), size

    def forward(self, batch: dict) -> dict:
        return {"loss": (self.weight * self.size).sum()}


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path) -> None:
    """Gradients are finite to the last step, and what it makes of the weights is not."""
    task = Scaled(1e30)
    optim = OptimSettings(optimizer="sgd", lr=1e10, lr_batch=8, clip_norm=None)
    stages = [Stage("good", task, tiny_run.tiny_feeds().train, 1, OptimSettings(lr_batch=8))]
    stages += [Stage("bad", task, tiny_run.tiny_feeds().train, 1, optim)]
    with pytest.raises(TrainingError, match="stage bad, step 2: the weights are not finite"):
        Trainer(task, RunSettings(tmp_path, "x", checkpoint_every=2), Accelerator(cpu=True)).fit(stages)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name.startswith("stage01")
    assert torch.isfinite(load_file(checkpoint / "model.safetensors")["weight"]).all()


@pytest.mark.parametrize(("size", "ends"), [(1e36, True), (float("inf"), False)])
def test_a_gradient_scaler_may_look_for_its_scale(tmp_path: Path, size: float, ends: bool) -> None:
    """As fp16 starts on CUDA: steps are skipped until the scale is low enough, but not for ever."""
    task, accelerator = Scaled(size), Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    optim = OptimSettings(optimizer="sgd", lr=1e-36, lr_batch=8, clip_norm=None)
    stage = Stage("half", task, tiny_run.tiny_feeds().train, 5, optim)
    trainer = Trainer(task, RunSettings(tmp_path, "x"), accelerator)
    if ends:
        trainer.fit([stage])
        assert task.weight.item() < 1
    else:
        with pytest.raises(TrainingError, match="stage half, step 19: the gradient is not finite"):
            trainer.fit([stage])
        assert task.weight.item() == 1


# ---- where batches go, and exact resume -------------------------------------------------------------------------


def test_the_first_look_takes_batches_to_the_interpreters_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on a device that cannot compute, so the look ends there."""
    seen = []

    def compute_prefix(_: GroupTask, images: torch.Tensor) -> None:
        seen.append(images.device.type)
        raise Stopped

    monkeypatch.setattr(GroupTask, "compute_prefix", compute_prefix)
    recipe = tiny_run.tiny_recipe(interpreter={"policy": "class", "start": "attention"})
    model = reduce(tiny_run.tiny_backbone(), 2, interpreter=recipe.reduction.interpreter).to("meta")
    with pytest.raises(Stopped):
        WarmStartTask(model, 0, 0.5).first_look(tiny_run.tiny_feeds().train)
    assert seen == ["meta"]


class Stopped(Exception):  # noqa: N818 - no error: the plug is pulled
    """Stands for a kill."""


def stop_at(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Ends training before the step after the first `steps` ones."""
    step, done = Trainer._step, []

    def counted(self: Trainer, *arguments: object) -> dict:
        if len(done) == steps:
            raise Stopped
        done.append(None)
        return step(self, *arguments)

    patch.setattr(Trainer, "_step", counted)


def cached_run(folder: Path, precision: str) -> tuple[list[Stage], dict[str, torch.Tensor]]:
    """A curriculum with cached prefixes and class attention to start from; its stages and final weights."""
    AcceleratorState._reset_state(True)
    recipe = tiny_run.tiny_recipe(
        interpreter={"policy": "class", "start": "attention"},
        cache_prefix=True,
        interpreter_epochs=2,
        warm_start_epochs=1.5,
        warm_start_sharpness=3.0,
        reward={"target": "dense", "soft": True, "error_penalty": 8.0},
        block_epochs=0,
    )
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    model = reduce(tiny_run.tiny_backbone(), 2, interpreter=recipe.reduction.interpreter, on_drop="merge")
    feed = tiny_run.tiny_feeds().train
    feed = replace(feed, how=replace(feed.how, flip=False, min_scale=1.0))  # only such pictures may be cached
    stages = [replace(stage, batches=feed, evaluate=None) for stage in tiny_run.tiny_stages(model, recipe, accelerator)]
    Trainer(model, RunSettings(folder, "tiny", seed=3, checkpoint_every=1), accelerator).fit(stages)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None and checkpoint.name.startswith("stage04")
    return stages, load_file(checkpoint / "model.safetensors")


def stopped_and_resumed(folder: Path, precision: str, steps: int) -> tuple[list[Stage], dict[str, torch.Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(steps, patch)
        with pytest.raises(Stopped):
            cached_run(folder, precision)
    return cached_run(folder, precision)


def test_resume_is_exact_with_cached_prefixes_and_a_start_from_attention(tmp_path: Path) -> None:
    _, wanted = cached_run(tmp_path / "undisturbed", "bf16")
    for steps in (1, 3, 6, 8, 11, 26, 40):  # 6 an epoch: imitation has 9, an interpreter 12
        _, got = stopped_and_resumed(tmp_path / str(steps), "bf16", steps)
        assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == [], f"stopped after {steps} steps"


def test_a_resumed_run_remembers_pictures_to_the_last_digit(tmp_path: Path) -> None:
    """Other pictures beside it in a batch change a picture's last digits, so batches are shown again as they were."""
    calm, _ = cached_run(tmp_path / "undisturbed", "no")
    for steps, index, kept in ((4, 0, "_evidence"), (8, 0, "_evidence"), (13, 1, "_goals")):
        stages, _ = stopped_and_resumed(tmp_path / str(steps), "no", steps)
        wanted, got = getattr(calm[index].task, kept), getattr(stages[index].task, kept)
        assert len(got) == 48 and got.keys() == wanted.keys()
        assert all(torch.equal(wanted[picture], got[picture]) for picture in wanted), f"stopped after {steps} steps"


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_last_one_stays(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    kept = save_checkpoint(tmp_path, model, None, Place(0, 1), "x")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(TrainingError, match=r"a checkpoint cannot be written .*free some space"):
            save_checkpoint(tmp_path, model, None, Place(0, 2), "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert latest_checkpoint(tmp_path) == kept
