"""The door to private parts of torch: each name does what wdhook needs; no other file has one."""

from __future__ import annotations

import ast
import gc
import inspect
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from imports import FILES, PACKAGE
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from wdhook._base import torch_private as door

SGD = torch.optim.SGD
DOOR = "_base.torch_private"


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape or (3,), requires_grad=True)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(tensor: Tensor) -> Any:
    """A DTensor on a mesh of one."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(distributed, "distribute_tensor"):
        pytest.skip("torch before 2.5 has it elsewhere")
    mesh = dist.init_device_mesh("cpu", (1,))
    return distributed.distribute_tensor(tensor, mesh, [distributed.Shard(0)])


# -- autograd --------------------------------------------------------------------------------------


def test_a_backward_pass_has_an_id() -> None:
    """-1 outside, one number for all hooks of a pass, others in the next and in nested passes."""
    outer, inner = leaf(), leaf()
    seen: list[int] = []
    nested: list[int] = []

    def hook(param: Tensor) -> None:
        seen.append(door.graph_task_id())
        with torch.enable_grad():
            inner.sum().backward()

    for param in (outer, other := leaf()):
        param.register_post_accumulate_grad_hook(hook)
    inner.register_post_accumulate_grad_hook(lambda p: nested.append(door.graph_task_id()))
    assert door.graph_task_id() == -1
    for _ in range(2):
        (outer.sum() + other.sum()).backward()
    assert door.graph_task_id() == -1
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert min(seen) >= 0
    assert len({*seen, *nested}) == 2 + 4


@pytest.mark.parametrize("queues_ours_first", [True, False])
def test_the_end_of_a_pass_comes_after_all_other_callbacks(queues_ours_first: bool) -> None:
    """Ours runs after every hook and after callbacks of others, whichever was queued first."""
    first, second = leaf(), leaf()
    events: list[str] = []

    def ours(param: Tensor) -> None:
        events.append("hook")
        door.at_the_end_of_the_pass(lambda: events.append("end"))

    def others(param: Tensor) -> None:
        events.append("hook of others")
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: events.append("callback of others"))

    first.register_post_accumulate_grad_hook(ours if queues_ours_first else others)
    second.register_post_accumulate_grad_hook(others if queues_ours_first else ours)
    (second * first.exp()).sum().backward()
    assert sorted(events) == ["callback of others", "end", "hook", "hook of others"]
    assert events[-2:] == ["callback of others", "end"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch")
def test_compiled_autograd_is_seen() -> None:
    """The region is seen inside of compiled autograd, and not in an ordinary pass."""
    from torch._dynamo import compiled_autograd

    if not hasattr(compiled_autograd, "_enable"):
        pytest.skip("this torch has no such switch")
    seen: list[bool] = []

    @torch.compiler.disable
    def hook(param: Tensor) -> None:
        seen.append(door.in_compiled_autograd())

    param = leaf()
    param.register_post_accumulate_grad_hook(hook)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        param.square().sum().backward()
    param.square().sum().backward()
    torch._dynamo.reset()
    assert seen == [True, False]


def test_a_hook_can_be_the_first() -> None:
    """Hooks run in the order of the dictionary, ours before those that were there."""
    param = leaf()
    called: list[str] = []
    param.register_post_accumulate_grad_hook(lambda p: called.append("one"))
    param.register_post_accumulate_grad_hook(lambda p: called.append("two"))
    handle = door.register_first(param, lambda p: called.append("ours"))
    assert len(door.hooks_of(param)) == 3
    param.sum().backward()
    assert called == ["ours", "one", "two"]
    handle.remove()
    assert len(door.hooks_of(param)) == 2
    param.sum().backward()
    assert called[3:] == ["one", "two"]


def test_the_hooks_of_a_parameter_inside_of_a_hook() -> None:
    """The dictionary is there while a hook runs, and grows and shrinks with the hooks."""
    param = leaf()
    seen: list[int] = []
    param.register_post_accumulate_grad_hook(lambda p: seen.append(len(door.hooks_of(p))))
    param.sum().backward()
    other = param.register_post_accumulate_grad_hook(lambda p: None)
    param.sum().backward()
    other.remove()
    param.sum().backward()
    assert seen == [1, 2, 1]


# -- tensors ---------------------------------------------------------------------------------------


def test_versions() -> None:
    """A change in place counts one, also in views, as autograd's addition does; `.data` none."""
    tensor = torch.zeros(4)
    assert door.version(tensor) == 0
    tensor.add_(1)
    assert door.version(tensor) == door.version(tensor[:2]) == 1
    tensor[:2].mul_(2)
    assert door.version(tensor) == 2
    tensor.data.mul_(2)
    assert door.version(tensor) == 2
    param = leaf()
    param.sum().backward()
    grad = param.grad
    assert grad is not None
    before = door.version(grad)
    param.sum().backward()
    assert param.grad is grad
    assert door.version(grad) == before + 1
    with torch.inference_mode():
        unversioned = torch.zeros(1)
    assert door.version(unversioned) == -1
    assert door.versions([]) == []
    assert door.versions([tensor, grad]) == [2, before + 1]
    assert door.versions([tensor, unversioned]) == [2, -1]


@pytest.mark.usefixtures("group")
def test_versions_of_shards() -> None:
    """The local shard of a DTensor counts apart; an ordinary tensor has none."""
    tensor = sharded(torch.zeros(4))
    before = door.version(tensor), door.local_version(tensor)
    tensor.to_local().add_(1)
    assert door.local_version(tensor) == before[1] + 1
    assert door.version(tensor) == before[0]
    plain = torch.zeros(4).add_(1)
    assert door.local_version(plain) == 0


def test_views() -> None:
    """A slice is a view; a tensor, a copy and a gradient of autograd are none."""
    flat = torch.zeros(4)
    param = leaf()
    param.square().sum().backward()
    assert param.grad is not None
    assert door.is_view(flat[:2])
    assert door.is_view(flat.view(2, 2))
    assert not door.is_view(flat)
    assert not door.is_view(flat[:2].clone())
    assert not door.is_view(param.grad)


def test_values_of_sparse_tensors() -> None:
    """Values are there although indices repeat."""
    index = torch.tensor([[0, 0]])
    sparse = torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0]), (3,), check_invariants=False)
    assert door.sparse_values(sparse).tolist() == [1.0, 2.0]
    with pytest.raises(RuntimeError, match="uncoalesced"):
        sparse.values()


def test_memory_is_recognised_and_not_kept() -> None:
    """Another tensor on the memory is recognised; freed memory is nobody's."""
    tensor = torch.zeros(1000)
    known = door.storage_of(tensor)
    assert door.is_storage_of(known, tensor)
    assert door.is_storage_of(known, nn.Parameter(tensor.detach()))
    assert not door.is_storage_of(known, tensor.clone())
    assert not door.is_storage_of(None, tensor)
    del tensor
    gc.collect()
    again = [torch.zeros(1000) for _ in range(10)]  # one of them has the freed memory, it may be
    assert not any(door.is_storage_of(known, other) for other in again)


def test_memory_of_tensors_without_any() -> None:
    """A sparse tensor has no memory of its own, and no error is raised."""
    assert door.storage_of(torch.eye(2).to_sparse()) is None


@pytest.mark.usefixtures("group")
def test_memory_of_shards() -> None:
    """Of a DTensor the local shard counts."""
    tensor = sharded(torch.zeros(4))
    known = door.storage_of(tensor)
    assert door.is_storage_of(known, tensor)
    assert door.is_storage_of(known, tensor.to_local())


def test_a_weak_reference_to_memory_allows_swapping() -> None:
    """`swap_tensors` refuses weak references to a tensor, and allows those to its memory."""
    one, other = torch.zeros(2), torch.ones(2)
    known = door.storage_of(one)
    torch.utils.swap_tensors(one, other)
    assert door.is_storage_of(known, other)
    reference = weakref.ref(one)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(one, other)
    assert reference() is one


# -- optimizers ------------------------------------------------------------------------------------


def frames_of_steps() -> int:
    """Frames of torch's wrapper around steps, on the stack."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        code = frame.f_code
        count += code.co_filename == door.OPTIMIZER_FILE and code.co_name == "wrapper"
        frame = frame.f_back  # type: ignore[assignment]
    return count


def test_steps_are_frames_of_the_stack() -> None:
    """None outside of a step, one in its hooks, two where a step runs in the closure of another."""
    inner, outer = SGD([leaf()], lr=0.1), SGD([leaf()], lr=0.1)
    seen: list[int] = []
    inner.register_step_pre_hook(lambda *_: seen.append(frames_of_steps()))
    inner.step()
    outer.step(lambda: inner.step() or 0.0)
    assert frames_of_steps() == 0
    assert seen == [1, 2]


def test_the_hooks_of_a_step_run_in_the_order_that_is_read() -> None:
    """The process's, then the optimizer's, which are read late: one added by the first runs."""
    optimizer = SGD([leaf()], lr=0.1)
    called: list[str] = []

    def last(*_: Any) -> None:
        called.append("last")

    def of_the_process(stepping: Any, *_: Any) -> None:
        called.append("process")
        stepping.register_step_pre_hook(last)

    before = len(door.process_step_pre_hooks())
    assert not door.step_pre_hooks(optimizer)
    handle = register_optimizer_step_pre_hook(of_the_process)
    optimizer.register_step_pre_hook(lambda *_: called.append("own"))
    try:
        assert len(door.process_step_pre_hooks()) == before + 1
        assert list(door.process_step_pre_hooks().values())[-1] is of_the_process
        assert len(door.step_pre_hooks(optimizer)) == 1
        optimizer.step()
    finally:
        handle.remove()
    assert called == ["process", "own", "last"]
    assert list(door.step_pre_hooks(optimizer).values())[-1] is last
    assert len(door.process_step_pre_hooks()) == before


def test_a_step_post_hook_that_comes_first() -> None:
    """torch runs an optimizer's own step post-hooks in the order of their dict, then those of the
    process; one that is put first comes before all others, and goes with its handle."""
    called: list[str] = []
    optimizer = SGD([leaf()], lr=0.1)
    before = len(door.process_step_post_hooks())
    handle = register_optimizer_step_post_hook(lambda *_: called.append("process"))
    optimizer.register_step_post_hook(lambda *_: called.append("own"))
    first = door.register_first_step_post_hook(optimizer, lambda *_: called.append("first"))
    try:
        assert len(door.process_step_post_hooks()) == before + 1
        assert len(door.step_post_hooks(optimizer)) == 2
        optimizer.step()
    finally:
        handle.remove()
        first.remove()
    assert called == ["first", "own", "process"]
    assert len(door.step_post_hooks(optimizer)) == 1
    assert len(door.process_step_post_hooks()) == before


def test_a_hook_is_recognised_by_its_handle() -> None:
    """The id of a handle is the key of its hook, on its own parameter alone."""
    param, other = leaf(), leaf()
    handle = door.register_first(param, lambda _: None)
    assert door.has_hook(param, handle)
    assert not door.has_hook(other, handle)
    handle.remove()
    assert not door.has_hook(param, handle)


def test_both_kinds_of_hooks_are_seen() -> None:
    """`register_hook` and the other fill an attribute; without a hook it is None or empty."""
    param = leaf()
    assert door.hooks_on(param) == (None, None)
    handle = param.register_hook(lambda grad: grad)
    of_gradient, accumulated = door.hooks_on(param)
    assert len(of_gradient) == 1
    assert accumulated is None
    handle.remove()
    param.register_post_accumulate_grad_hook(lambda param: None)
    of_gradient, accumulated = door.hooks_on(param)
    assert not of_gradient
    assert len(accumulated) == 1


def test_each_new_hook_is_counted() -> None:
    """Both kinds of hooks of a parameter raise torch's count; taking one off does not."""
    param = leaf()
    before = RemovableHandle.next_id
    handles = [
        param.register_hook(lambda grad: grad),
        param.register_post_accumulate_grad_hook(lambda param: None),
    ]
    assert RemovableHandle.next_id == before + 2
    for handle in handles:
        handle.remove()
    assert RemovableHandle.next_id == before + 2


def test_a_parameter_that_fsdp1_has_flattened_says_so() -> None:
    """Parts of a flat parameter carry a mark of FSDP1, and no other parameter does."""
    flat_param = pytest.importorskip("torch.distributed.fsdp._flat_param")
    param = nn.Parameter(torch.ones(2))
    assert not door.is_part_of_flat_parameter(param)
    flat_param._set_fsdp_flattened(param)
    assert door.is_part_of_flat_parameter(param)


def test_a_checkpoint_makes_its_state_in_a_function_of_this_name() -> None:
    """The steps of torch.distributed.checkpoint that make a state have such a frame below them."""
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    seen: list[bool] = []

    def hook(*_: Any) -> None:
        frame: FrameType | None = sys._getframe()
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        seen.append(not door.STATE_MAKERS.isdisjoint(names))

    optimizer.register_step_pre_hook(hook)
    state_dict.get_optimizer_state_dict(model, optimizer)
    optimizer.step()
    assert seen == [True, False]


# -- compilation -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_function_is_never_compiled() -> None:
    """Called from compiled code it runs as Python, with all that it calls."""
    seen: dict[str, list[bool]] = {"ours": [], "below": []}

    def below() -> None:
        seen["below"].append(torch.compiler.is_compiling())

    @door.never_compiled
    def ours() -> None:
        seen["ours"].append(torch.compiler.is_compiling())
        below()

    counted = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(len([n for n in graph.graph.nodes if n.op == "call_function"]))
        return graph.forward

    @torch.compile(backend=backend)
    def compiled(x: Tensor) -> Tensor:
        y = x + 1
        ours()
        return y * 2

    assert compiled(torch.ones(2)).tolist() == [4.0, 4.0]
    torch._dynamo.reset()
    assert seen["ours"] == seen["below"] == [False]
    assert counted == [1, 1]  # two graphs, one on each side of the call


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_function_holds_the_one_before() -> None:
    """A compiled `step` is recognised by the function that it was made from."""
    optimizer = SGD([leaf()], lr=0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    assert getattr(compiled, door.COMPILED_FROM) == optimizer.step


# -- distributed -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_an_optimizer_in_a_communication_hook() -> None:
    """A communication hook with an optimizer step is told from one that averages."""
    hooks = pytest.importorskip("torch.distributed.algorithms.ddp_comm_hooks")
    overlap = pytest.importorskip(f"{hooks.__name__}.optimizer_overlap_hooks")
    average = pytest.importorskip(f"{hooks.__name__}.default_hooks").allreduce_hook
    plain, averages, steps = (nn.parallel.DistributedDataParallel(nn.Linear(2, 2)) for _ in "123")
    averages.register_comm_hook(None, average)
    functional = SimpleNamespace(step_param=lambda param, grad: None)
    state = overlap._OptimizerHookState(functional)
    steps.register_comm_hook(None, overlap._hook_then_optimizer(average, state))
    assert not door.steps_in_communication_hook(plain)
    assert not door.steps_in_communication_hook(averages)
    assert door.steps_in_communication_hook(steps)


# -- pipelines -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_the_parts_of_a_pipeline_schedule() -> None:
    """Schedules have one base class, a number of micro-batches, and stages with a `submod`."""
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    if "scale_grads" not in inspect.signature(pipelining.ScheduleGPipe).parameters:
        pytest.skip("this torch has no `scale_grads`")
    module = nn.Linear(2, 2)
    cpu = torch.device("cpu")
    stage = pipelining.PipelineStage(module, 0, 1, cpu)
    halves = [pipelining.PipelineStage(module, i, 2, cpu) for i in range(2)]
    loss = nn.functional.mse_loss
    one = pipelining.ScheduleGPipe(stage, 4, loss_fn=loss)
    several = pipelining.ScheduleInterleaved1F1B(halves, 4, loss_fn=loss)
    kind = door.pipeline_schedules()
    assert kind is not None
    for schedule, count in ((one, 1), (several, 2)):
        assert isinstance(schedule, kind)
        assert door.micro_batches(schedule) == 4
        assert [s.submod for s in door.stages(schedule)] == [module] * count
        assert schedule.scale_grads is True


# -- the house -------------------------------------------------------------------------------------


def test_every_name_of_the_door_has_a_test() -> None:
    """Public functions and constants of the door are all used in this file."""
    tree = ast.parse(FILES[DOOR].read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    names = {name for name in names if not name.startswith("_")}
    assert {"graph_task_id", "STATE_MAKERS", "stages"} <= names
    used = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "door"
    }
    assert names - used == set()


# Private names that are read outside of the door, with the reason.
ALLOWED = {
    "_z3_optimizer": "of DeepSpeed, which leaves it on parameters",
    "_zero_optimizer": "of DeepSpeed, likewise",
    "_hp_mapping": "of DeepSpeed, likewise: the parameter's place in the flat copy",
    "_parameters": "of nn.Module: the only way to a parameter by its owner's local name",
    "_modules": "of nn.Module: likewise",
    "_foreach_add_": "the kernel of torch.optim, public by use",
    "_foreach_lerp_": "the kernel of torch.optim, public by use",
    "_foreach_mul_": "the kernel of torch.optim, public by use",
    "_foreach_norm": "the kernel of torch.nn.utils, public by use",
    "_ConvNd": "the base class of the public convolutions",
    "_NormBase": "the base class of the public normalizations",
    "_BatchNorm": "the base class of the public normalizations, which recipes name",
    "_InstanceNorm": "the base class of the public normalizations, which recipes name",
    "_python_dispatch": "of the audit's dispatch modes, the only way to see operations",
    "_schema": "of operations in the audit's dispatch modes",
    "_cdata": "of storages in the audit's dispatch modes",
    "_to_copy": "an operation in the audit's dispatch modes",
    "_fields": "of named tuples, of Python",
    "_getframe": "of sys, of Python",
    "_ActionsContainer": "of argparse, of Python: for annotations",
    "_SubParsersAction": "of argparse, of Python: for annotations",
    "_logger_connector": "of Lightning: the names of its metrics",
}


def private_names(source: str) -> set[tuple[int, str]]:
    """Underscore names that a file reads as attributes, by `getattr`, or imports from torch."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr"):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
                names = [text for text in texts if isinstance(text, str)]
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                names += alias.name.split(".")
        for name in names:
            if name.startswith("_") and not name.endswith("__"):
                found.add((node.lineno, name))
    return found


def defined_names(sources: Iterator[str]) -> set[str]:
    """Underscore names that the package defines: functions, classes, attributes, constants."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and _is_set_on_self(node):
                found.add(node.attr)
    return found


def _is_set_on_self(node: ast.Attribute) -> bool:
    if not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_nobody_else_reads_private_parts_of_torch() -> None:
    """Attributes with an underscore are the package's own, or in the list above."""
    own = defined_names(path.read_text() for name, path in FILES.items() if name != DOOR)
    found = []
    for name, path in FILES.items():
        if name == DOOR:
            continue
        for line, attribute in sorted(private_names(path.read_text())):
            if attribute not in own and attribute not in ALLOWED:
                found.append(f"{path.relative_to(PACKAGE.parent)}:{line} {attribute}")
    assert found == []


def test_the_search_for_private_names_finds_them() -> None:
    """Twin: each way to read one is found, and what the package defines is told apart."""
    source = (
        "from torch._dynamo import reset\nimport torch._inductor\nx.grad._version\n"
        "getattr(x, '_base')\nclass A:\n    def __init__(self): self._own = self._mine()\n"
        "    def _mine(self): return self._x\n"
    )
    found = {name for _, name in private_names(source)}
    assert found == {"_dynamo", "_inductor", "_version", "_base", "_own", "_mine", "_x"}
    assert defined_names(iter([source])) == {"A", "__init__", "_own", "_mine"}
    assert {name for _, name in private_names(FILES[DOOR].read_text())} >= {"_version", "_is_view"}
