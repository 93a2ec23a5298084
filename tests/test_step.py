"""A trainer's step: what it computes, that it asks the device nothing, and that nothing of it is made anew."""

import copy
import ctypes
import platform
import resource
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from no_sync import asks_nothing
from rich.console import Console
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.utils import counters

import timm_tickets as tt
from timm_tickets.config.parts import TrainingSettings
from timm_tickets.core.private import traces_gradients
from timm_tickets.experiments.begin import built
from timm_tickets.pruning.run import Place
from timm_tickets.training import graphs as graphs_module
from timm_tickets.training import step as step_module
from timm_tickets.training.finite_check import Watch
from timm_tickets.training.graphs import Captured, Parts
from timm_tickets.training.memory import keep_freed_memory
from timm_tickets.training.step import Step
from timm_tickets.training.supported import deterministic, memory_format
from timm_tickets.training.trainer import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own tracer
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have a score above zero"),
    pytest.mark.filterwarnings("ignore:jackpot"),
    pytest.mark.filterwarnings("ignore:.*has not moved its mask"),
]
CARD = pytest.param("captured", marks=pytest.mark.cuda)
COMPILES = pytest.mark.skipif(not traces_gradients(), reason="this torch compiles no gradients, so a step refuses it")
STEPS, CLASSES = 8, 4


def network(device="cpu"):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).to(device)
    model.num_classes = CLASSES
    return model


def batch(run, number, device="cpu"):
    generator = torch.Generator().manual_seed(1000 * run.index + number)
    images = torch.randn(6, 3, 8, 8, generator=generator)
    classes = torch.tensor(list(run.classes or range(CLASSES)))
    target = classes[torch.randint(len(classes), (6,), generator=generator)]
    return (images, target) if device == "cpu" else (images.to(device), target.to(device))


METHODS = {
    "imp": {"sparsity": 0.6, "prune_rate": 0.4},
    "colt": {"sparsity": 0.5, "prune_rate": 0.3},
    "continuous_sparsification": {"sparsity": 0.5, "rounds": 2, "rewind": "0ep", "penalty": 1e-3},
    "edge_popup": {"sparsity": 0.5, "scale": "dynamic", "scope": "global"},
    "frozen_slt": {"sparsity": 0.5},
    "jackpot": {"sparsity": 0.5, "low_score": 0.9},
}


def optimizer_of(model, name="sgd"):
    more = {"momentum": 0.9} if name == "sgd" else {"eps": 1e-3}  # or rounding would be divided by rounding
    return create_optimizer_v2(model, name, lr=0.05, weight_decay=1e-2, **more)


def copied(model):
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


class Search:
    """A search of a small network by a trainer's step; `ends` has what runs ended with, `runs` where all is."""

    def __init__(self, method, way="eager", opt="sgd", batches=1, clip=None, device="cpu"):
        more = {"torchcompile": "eager"} if way == "compiled" else {}
        self.settings = TrainingSettings(step=way, grad_accum_steps=batches, clip_grad=clip, **more)
        if device != "cpu":  # tests before this one may have had Accelerate begin on the CPU, where it would stay
            AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=device == "cpu", gradient_accumulation_steps=batches)
        self.device, self.said, self.losses, self.ends, self.runs = device, [], [], [], []
        self.model = network(device)
        self.pruner = tt.create_pruner(method, self.model, epochs=1, **METHODS[method])
        prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer_of(self.model, opt))
        self.step = Step(self.settings, self.accelerator, prepared, self.optimizer, CLASSES)
        self.criterion = self.step.criterion = nn.CrossEntropyLoss()

    def go(self, until=None):
        for run in self.pruner:
            self.train(run)
            if until is not None and run.index == until:
                break
        return self

    def train(self, run):
        run.batches_per_epoch = STEPS
        self.step.begin_(run, self.said.append)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05
        for number in range(STEPS):
            if number == STEPS // 2:
                for group in self.optimizer.param_groups:  # as timm's schedules do
                    group["lr"] = 0.02
            self.take(run, number)
            if number in (STEPS // 2, STEPS - 1):
                self.runs.append(self.places())
        self.ends.append(copied(self.model))

    def take(self, run, number):
        self.step.take(*batch(run, number, self.device), self.criterion, lambda loss: self.losses.append(loss.detach()))

    def places(self):
        """Where everything is that a step reads or writes."""
        found = {f"model {name}": value for name, value in self.model.state_dict().items()}
        found |= {f"buffer {name}": value for name, value in self.model.named_buffers()}
        found |= {f"gradient {name}": p.grad for name, p in self.model.named_parameters()}
        for number, state in enumerate(self.optimizer.optimizer.state.values()):
            found |= {f"state {number} {name}": value for name, value in state.items()}
        found |= {f"rate {number}": group["lr"] for number, group in enumerate(self.optimizer.param_groups)}
        subnet = self.pruner.subnet
        found |= {f"held {name}": mask for name, mask in subnet._mask.items() if name not in subnet.gates}
        found |= {f"number {name}": value for name, value in self.pruner.subnet.now.items()}
        for count, part in self.step._slices.items():
            found |= {f"slice {count} {name}": value for name, value in vars(part).items()}
        return {name: value.data_ptr() for name, value in found.items() if isinstance(value, torch.Tensor)}


def with_hooks(method, opt="sgd", batches=1, clip=None):
    """The same search by a loop of one's own, whose masks hooks hold."""
    model, ends = network(), []
    pruner, criterion = tt.create_pruner(method, model, epochs=1, **METHODS[method]), nn.CrossEntropyLoss()
    optimizer = optimizer_of(model, opt)
    for run in pruner:
        run.batches_per_epoch = STEPS
        run.attach(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        for number in range(STEPS):
            if number == STEPS // 2:
                for group in optimizer.param_groups:
                    group["lr"] = 0.02
            images, target = batch(run, number)
            (run.loss(criterion, model(images), target) / batches).backward()
            if (number + 1) % batches == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        ends.append(copied(model))
    return ends


def same(one, other, exactly=True):
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        for name, value in first.items():
            assert torch.equal(value, second[name]) if exactly else torch.allclose(value, second[name], atol=1e-4), name


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_it_does_what_hooks_do_bit_for_bit(opt, clip, batches):
    same(Search("imp", "eager", opt, batches, clip).go().ends, with_hooks("imp", opt, batches, clip))


@pytest.mark.parametrize("method", ["colt", "continuous_sparsification"])
def test_of_every_method(method):
    same(Search(method).go().ends, with_hooks(method))


def graphs():
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("way", [pytest.param("compiled", marks=COMPILES), CARD])
@pytest.mark.parametrize(("method", "opt"), [*((method, "sgd") for method in METHODS), ("imp", "adamw")])
def test_one_graph_for_all_runs_and_everything_stays_where_it_is(method, opt, way):
    torch._dynamo.reset()
    counters.clear()
    device = "cuda" if way == "captured" else "cpu"
    search = Search(method, way, opt, device=device).go()
    assert search.said == []
    assert len(search.step.made) == 1
    assert graphs() == ((1, {}) if way == "compiled" else (0, {}))
    assert (len(search.ends) > 1) == (method in ("imp", "colt", "continuous_sparsification"))
    first, *others = search.runs
    assert len(others) > 0
    assert all(places == first for places in others)
    kinds = {name.split()[0] for name in first}
    assert {"model", "buffer", "gradient", "state", "rate"} <= kinds
    scheduled = method in ("continuous_sparsification", "jackpot")
    assert ("slice" in kinds, "number" in kinds) == (method == "colt", scheduled)
    same(search.ends, Search(method, "eager", opt, device=device).go().ends, exactly=False)


@COMPILES
def test_several_batches_a_step_take_two_graphs():
    torch._dynamo.reset()
    counters.clear()
    search = Search("imp", "compiled", batches=2, clip=0.1).go()
    assert graphs() == (2, {})
    same(search.ends, Search("imp", "eager", batches=2, clip=0.1).go().ends, exactly=False)


@pytest.mark.parametrize("way", [pytest.param("compiled", marks=COMPILES), CARD])
@pytest.mark.parametrize("batches", [1, 2])
def test_controls_after_a_search_have_their_own_masks_and_gradients(batches, way):
    """A graph knows memory: that of a search's masks goes with its ticket, and a run by Python might drop gradients."""
    torch._dynamo.reset()
    device, ends = "cuda" if way == "captured" else "cpu", []
    for how in (way, "eager"):
        search = Search("imp", how, batches=batches, device=device).go()
        subnet, ticket = search.pruner.subnet, search.pruner.ticket
        dense = {name: torch.ones_like(mask) for name, mask in ticket.masks.items()}
        for index, (masks, more) in enumerate([(ticket.masks, {}), (ticket.masks, {"before_step": id}), (dense, {})]):
            subnet.set_mask_(masks)
            run = tt.Training(tt.Run(1, **more), subnet, Place("control", 10 + index))
            search.train(run)
            run.finish_()
        ends.append(search.ends)
        assert all(weight.cpu()[~ticket.masks[name]].any() for name, weight in subnet.weights().items())
    same(*ends, exactly=False)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_asks_the_device(method):
    search, asked = Search(method, batches=2, clip=0.1), []
    take = search.step.take

    def watched(*args):
        with asks_nothing():
            take(*args)
        asked.append(search.step.run)

    search.step.take = watched
    search.go()
    assert len(asked) == STEPS * len(search.ends)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_capture_records_asks_nothing(method):
    """On a card a fused optimizer takes the step; this one would ask for its rate, so it has a number here."""
    search = Search(method, clip=0.1)
    run = next(search.pruner)
    run.batches_per_epoch = STEPS
    search.step.begin_(run, print)
    search.step.now = "captured"
    images, target = batch(run, 0)
    for gate in run.subnet.gates.values():
        gate.early = False
    search.step._by_python(images, target, search.losses.append, True)
    before = copied(search.model)
    run.set_numbers_()
    parts = Parts(search.settings, run, search.model, search.optimizer, search.criterion)
    with asks_nothing():
        parts.learn_by_engine(images, target)
        parts.move()
    assert any(not torch.equal(value, before[name]) for name, value in copied(search.model).items())


@COMPILES
def test_a_checkpoint_is_loaded_into_the_tensors_that_are_there():
    search = Search("imp", "compiled").go(until=0)
    before, states = search.places(), copy.deepcopy(search.optimizer.optimizer.state_dict())
    for state in states["state"].values():
        state["momentum_buffer"].fill_(30)
    run = next(search.pruner)
    run.batches_per_epoch = STEPS
    search.step.begin_(run, print)
    search.optimizer.optimizer.load_state_dict(states)
    for group in search.optimizer.param_groups:
        group["lr"] = 0.0
    search.take(run, 0)
    assert search.places() == before
    momentum = [state["momentum_buffer"] for state in search.optimizer.optimizer.state.values()]
    assert all((value > 20).any() for value in momentum)  # of what was loaded, a step later


@COMPILES
def test_a_step_that_asks_the_host_before_masks_goes_through_python():
    """A method's tap wants gradients from before they are masked: that step no graph takes."""
    search = Search("imp", "compiled")
    run = next(search.pruner)
    run.batches_per_epoch = STEPS
    search.step.begin_(run, print)
    search.take(run, 0)
    run.subnet.tap_(True)
    search.take(run, 1)
    assert search.step.made == {}
    assert set(run.subnet.dense_gradients()) == set(run.subnet.names)


@pytest.fixture
def recording(monkeypatch):
    """A pretended card: what it records is carried out, and torch is told that it is recorded; what is left of it."""
    left = SimpleNamespace(captures=False, stream=None, pools=[])

    @contextmanager
    def graph(*_, **__):
        left.captures = True
        try:
            yield
        finally:
            left.captures = False

    here = SimpleNamespace(is_capturing=lambda: left.captures)
    card = {"graph": graph, "CUDAGraph": SimpleNamespace, "graph_pool_handle": lambda: (0, 1)}
    card |= {"current_stream": lambda: here, "set_stream": lambda stream: setattr(left, "stream", stream)}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: here)
    monkeypatch.setattr(graphs_module, "forget_capture_", lambda device, pool: left.pools.append(pool))
    return left


@pytest.mark.parametrize("fails", [False, True])
def test_adam_is_recorded_and_a_recording_that_fails_is_let_go_of(fails, recording):
    search = Search("imp", opt="adamw")
    run, images, target = next(search.pruner), *batch(SimpleNamespace(index=0, classes=None), 0)
    run.batches_per_epoch = STEPS
    search.step.begin_(run, print)
    search.step.now, search.step._states.fused = "captured", True
    search.step._states.keep_()
    search.step._by_python(images, target, search.losses.append, True)
    before = copied(search.model)
    parts = Parts(search.settings, run, search.model, search.optimizer, search.criterion)
    if fails:
        parts.move = lambda: int("x")
        with pytest.raises(ValueError, match="'x'"):
            Captured(parts, images, target, None)
        assert recording.stream is torch.cuda.current_stream()
        assert recording.pools == [(0, 1)]
    else:
        Captured(parts, images, target, None)
        assert any(not torch.equal(value, before[name]) for name, value in copied(search.model).items())
        assert recording.pools == []
    assert not any(group["capturable"] for group in search.optimizer.param_groups)  # no checkpoint is to have it


@pytest.mark.parametrize("asked", ["auto", "captured"])
def test_what_a_card_cannot_record_goes_on_by_python_and_says_so(asked, monkeypatch):
    def refused(*_):
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # all torch says

    monkeypatch.setattr(Step, "_graph", refused)
    search = Search("imp")
    search.step.settings, search.step.way = search.settings.model_copy(update={"step": asked}), "captured"
    if asked == "captured":
        with pytest.raises(tt.TrainingError, match=r"training\.step: .* when stream is capturing; set auto or eager"):
            search.go()
        return
    search.go()
    (said,) = search.said
    assert said.startswith("training.step: eager from here on, as this model's step cannot be recorded as a CUDA graph")
    same(search.ends, Search("imp").go().ends, exactly=False)


@pytest.mark.parametrize(
    ("settings", "opt", "told"),
    [
        ({"step": "captured"}, "sgd", "captured cannot be had here, as it records a CUDA graph; set auto or eager"),
        ({"step": "compiled"}, "lion", "compiled cannot be had here, as Lion's state cannot be kept in place"),
        ({"step": "compiled"}, "lookahead_adamw", "as several processes, .* Lookahead"),
    ],
)
def test_what_cannot_be_had_is_refused(settings, opt, told):
    accelerator, model = Accelerator(cpu=True), network()
    optimizer = accelerator.prepare(create_optimizer_v2(model, opt, lr=0.1))
    with pytest.raises(tt.SettingError, match=told):
        Step(TrainingSettings(**settings), accelerator, model, optimizer, CLASSES)


def test_a_torch_that_compiles_no_gradients_is_refused_beforehand(monkeypatch):
    monkeypatch.setattr(step_module, "traces_gradients", lambda: False)
    told = r"compiled cannot be had here, as torch .* compiles no gradients \(2\.15 does\); set auto or eager$"
    with pytest.raises(tt.SettingError, match=told):
        Search("imp", "compiled")


def test_on_a_cpu_auto_is_eager_and_on_a_card_it_says_why_it_is():
    accelerator, model, said = SimpleNamespace(scaler=None, distributed_type=None, num_processes=1), network(), []
    for opt, device, way in (("sgd", "cpu", "eager"), ("sgd", "cuda", "captured"), ("lion", "cuda", "eager")):
        optimizer = SimpleNamespace(optimizer=(plain := create_optimizer_v2(model, opt, lr=0.1)))
        optimizer.param_groups, accelerator.device = plain.param_groups, torch.device(device)
        step = Step(TrainingSettings(), accelerator, model, optimizer, CLASSES)
        assert step.way == way
        run = next(tt.create_pruner("imp", model, sparsity=0.5, epochs=1))
        if way == "eager":
            step.begin_(run, said.append)
    assert said == [
        "training.step: eager, as Lion's state cannot be kept in place over runs; that of sgd without dampening, adam "
        "and adamw can"
    ]


def switches():
    memory = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, memory


@pytest.mark.parametrize(
    ("asked", "device", "within"),
    [
        (None, "cpu", (True, False, False)),
        (None, "cuda", (False, True, True)),
        (True, "cuda", (True, False, False)),
        (False, "cuda", (False, True, True)),
        (False, "cpu", (False, False, True)),
    ],
)
def test_deterministic_is_what_was_asked_and_set_back(asked, device, within, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = switches()
    with suppress(KeyError), deterministic(asked, torch.device(device)):  # an error sets it back, too
        assert switches() == within
        raise KeyError
    assert switches() == before == (False, False, True)
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic(False, torch.device("cuda")):  # whoever asked torch itself has them
            assert switches() == (True, False, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("given", "amp", "device", "last"),
    [
        (None, False, "cpu", True),
        (None, True, "cpu", True),
        (None, False, "cuda", False),
        (None, True, "cuda", True),
        (False, True, "cpu", False),
        (True, False, "cuda", True),
    ],
)
def test_channels_lie_innermost_where_that_is_faster_or_asked_for(given, amp, device, last):
    settings = TrainingSettings(channels_last=given, amp=amp)
    assert memory_format(settings, torch.device(device)) == (torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("last", [None, False])
def test_weights_and_images_lie_as_the_setting_says(last, monkeypatch):
    recipe = tt.load_recipe("digits_imp", [] if last is None else ["training.channels_last=false"])
    data, model = built(recipe, Console(quiet=True))
    trainer = Trainer(recipe, model, data)
    asked = torch.contiguous_format if last is False else torch.channels_last
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.is_contiguous(memory_format=asked)
    assert trainer._laid_out(torch.zeros(2, 3, 8, 8)).is_contiguous(memory_format=asked)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_what_a_step_has_freed_is_there_for_the_next(monkeypatch):
    def filled():
        return [torch.ones(4 << 20) for _ in range(8)]  # 16 MiB each

    keep_freed_memory()
    filled()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        filled()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2_000  # of 163,840 pages
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")  # whoever has asked for something has it
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was told something else"))
    keep_freed_memory()


def watched(model, every, folder=None, good=None):
    run = tt.Training(tt.Run(1), tt.Subnet(model, ["0.weight"]))
    watch = Watch(run, torch.device("cpu"), folder, good)
    watch.every, watch.losses = every, torch.zeros(every)
    return run, watch


def test_losses_are_looked_at_every_so_many_steps_and_the_first_bad_one_is_named():
    run, watch = watched(network(), every=4)
    losses = [torch.tensor(value) for value in (1.0, float("nan"), 2.0, float("inf"))]
    for loss in losses[:3]:
        with asks_nothing():
            watch.see(loss)
        run.step += 1
    with pytest.raises(tt.TrainingError, match="not finite at step 1 of the run"):
        watch.see(losses[3])


def test_the_last_good_state_is_copied_where_the_model_is_into_the_same_memory(tmp_path):
    model = network()
    model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
    _, watch = watched(model, 1, tmp_path)
    before = {name: value.data_ptr() for name, value in watch.good.items()}
    kept = model[0].weight.detach().clone()
    _, watch = watched(model, 1, tmp_path, watch.good)  # of the next run
    watch.keep()
    assert {name: value.data_ptr() for name, value in watch.good.items()} == before
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(tt.TrainingError, match=r"0.weight is not finite after step 0 .*last_good"):
        watch.keep()
    assert torch.equal(load_file(tmp_path / "last_good.safetensors")["0.weight"], kept)
