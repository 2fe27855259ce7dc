"""Runs the Gluon kernels' own source on a CPU, with a GPU's hazards as bad as they may be.

Gluon has no interpreter. Here a kernel's function is called with a module `gl` that computes with
torch. Layouts are left to the compiler. What happens at some time between two points on a GPU
happens here at the worst one:

- an asynchronous copy spoils its buffer when it starts, and lands at the first barrier after the
  wait that covers it;
- a product of warpgroups reads its buffers when it is waited for, not when it starts;
- shared memory that was written is not seen before a barrier, and by a product not before a fence;
- shared memory that was read is not written again before a barrier (for a product: one after its
  wait).

A load or copy outside its tensor is an error, as is the use of a product before its wait.
"""

from __future__ import annotations

import builtins
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.language import constexpr
from triton.runtime.jit import JITFunction


class HazardError(AssertionError):
    """What a GPU may get wrong."""


class Block:
    """A tensor in registers."""

    def __init__(self, data: Tensor) -> None:
        self._data: Tensor | None = data

    @property
    def data(self) -> Tensor:
        """Its values."""
        if self._data is None:
            raise HazardError("a product is used before its wait")
        return self._data

    @property
    def type(self) -> Any:
        """Its type; layouts are the compiler's business."""
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype) -> Block:
        """The values in another format."""
        return Block(self.data.to(dtype))

    def __getitem__(self, key: Any) -> Block:
        return Block(self.data[key])

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


def plain(x: Any) -> Any:
    """What torch takes."""
    return x.data if isinstance(x, Block) else x


def _operator(name: str) -> Callable[[Block, Any], Any]:
    def apply(self: Block, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Block(getattr(self.data, name)(plain(other)))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod",
              "lt", "le", "gt", "ge", "and"):  # fmt: skip
    setattr(Block, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Addresses in a tensor's storage, counted in elements."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, torch.as_tensor(offset)

    @property
    def dtype(self) -> Any:
        """As Triton's pointer type."""
        return types.SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + plain(other))

    def places(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The storage, the addresses and which of them are meant."""
        storage = self.base.view(torch.uint8) if self.base.dtype.itemsize == 1 else self.base
        size = storage.untyped_storage().nbytes() // storage.itemsize
        flat = storage.as_strided((size,), (1,), 0)
        wanted = torch.as_tensor(True if mask is None else plain(mask))
        at, wanted = torch.broadcast_tensors(self.offset.long() + storage.storage_offset(), wanted)
        if bool((wanted & ((at < 0) | (at >= len(flat)))).any()):
            raise HazardError("an address outside the tensor")
        return flat, at, wanted


class Shared:
    """Shared memory, or one buffer of it, or that turned."""

    def __init__(self, data: Tensor, state: list[State]) -> None:
        self.data, self.state = data, state

    def index(self, place: Any) -> Shared:
        """One of several buffers."""
        return Shared(self.data[int(place)], [self.state[int(place)]])

    def permute(self, order: tuple[int, ...]) -> Shared:
        """The same memory with turned axes."""
        return Shared(self.data.permute(order), self.state)

    def store(self, block: Block) -> None:
        """What all threads write."""
        (state,) = self.state
        state.may_be_written()
        if block.data.dtype != self.data.dtype:
            raise HazardError(f"{block.data.dtype} is stored as {self.data.dtype}")
        self.data.copy_(block.data)
        state.unsynced = state.unfenced = True

    def load(self, layout: Any) -> Block:
        """What all threads read."""
        (state,) = self.state
        if state.unsynced:
            raise HazardError("shared memory is read before a barrier")
        state.read = True
        return Block(_copied(self.data))


class State:
    """What happened to a buffer since the last barrier or fence."""

    def __init__(self) -> None:
        self.unsynced = True
        self.unfenced = True
        self.read = False
        self.products = 0
        """Products that read it and have not been waited for."""

    def may_be_written(self) -> None:
        """Whether nobody can still be reading."""
        if self.read or self.products:
            raise HazardError("shared memory is written while it may be read")


def _copied(x: Tensor) -> Tensor:
    return x.clone()


class Machine:
    """One program: its shared memory, copies and products under way."""

    def __init__(self, programs: tuple[int, int], place: tuple[int, int]) -> None:
        self.programs, self.place = programs, place
        self.states: list[State] = []
        self.open: list[tuple[Shared, Tensor]] = []
        self.groups: list[list[tuple[Shared, Tensor]]] = []
        self.landed: list[tuple[Shared, Tensor]] = []
        self.products: list[tuple[Block, Any, Any, Block]] = []
        self.ended: list[State] = []

    # --- memory ---

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Block:
        """From global memory."""
        flat, at, wanted = pointer.places(mask)
        found = flat[at.where(wanted, 0)]
        found = found.view(pointer.base.dtype) if flat.dtype == torch.uint8 else found
        if bool(wanted.all()):
            return Block(found)
        return Block(torch.where(wanted, found, torch.as_tensor(other, dtype=found.dtype)))

    def store(self, pointer: Pointer, block: Block, mask: Any = None) -> None:
        """To global memory."""
        flat, at, wanted = pointer.places(mask)
        value = block.data.to(flat.dtype).broadcast_to(at.shape)
        wanted = wanted.broadcast_to(at.shape)
        flat[at[wanted]] = value[wanted]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        """Buffers that hold nothing yet: NaN."""
        data = torch.full(shape, float("nan"), dtype=torch.float32).to(dtype)
        states = [State() for _ in range(shape[0] if len(shape) == 3 else 1)]
        self.states += states
        return Shared(data, states)

    # --- copies ---

    def copy(self, buffer: Shared, source: Pointer, mask: Any) -> None:
        """Starts a copy: the buffer holds nothing of use until it has landed."""
        buffer.state[0].may_be_written()
        in_bytes = source.base.itemsize == 1
        data = self._bytes(source, mask) if in_bytes else self.load(source, mask, 0.0)
        buffer.data.copy_(torch.full(buffer.data.shape, float("nan")).to(buffer.data.dtype))
        buffer.state[0].unsynced = buffer.state[0].unfenced = True
        self.open.append((buffer, data.data))

    def _bytes(self, source: Pointer, mask: Any) -> Block:
        flat, at, wanted = source.places(mask)
        return Block(torch.where(wanted, flat[at.where(wanted, 0)], 0).to(torch.uint8).view(
            source.base.dtype))  # fmt: skip

    def commit_group(self) -> None:
        """Makes the copies started since the last time one group."""
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, left: int) -> None:
        """Waits until so many groups are under way."""
        while len(self.groups) > left:
            self.landed += self.groups.pop(0)

    # --- order ---

    def barrier(self) -> None:
        """All threads have come here."""
        for buffer, data in self.landed:
            buffer.data.copy_(data)
        self.landed = []
        for state in self.states:
            state.unsynced = any(state is b.state[0] for g in self.groups for b, _ in g)
            state.read = False
        for state in self.ended:
            state.products -= 1
        self.ended = []

    def fence(self) -> None:
        """Products see what threads have written."""
        for state in self.states:
            state.unfenced = any(state is b.state[0] for g in self.groups for b, _ in g)

    # --- products ---

    def product(self, a: Any, b: Any, acc: Block, *, is_async: bool) -> Block:
        """Starts a product that is added to `acc`."""
        assert is_async
        for one in (a, b):
            if isinstance(one, Shared):
                (state,) = one.state
                if state.unsynced or state.unfenced:
                    raise HazardError("a product reads shared memory before a barrier and a fence")
                state.products += 1
        made = Block(torch.empty(0))
        made._data = None
        self.products.append((made, a, b, acc))
        return made

    def wait_products(self, left: int, deps: list[Block]) -> Block:
        """Waits until so many products are under way; only now do they read."""
        while len(self.products) > left:
            made, a, b, acc = self.products.pop(0)
            if a.data.dtype != b.data.dtype:
                raise HazardError(f"a product of {a.data.dtype} and {b.data.dtype}")
            made._data = acc.data + a.data.float() @ b.data.float()
            self.ended += [one.state[0] for one in (a, b) if isinstance(one, Shared)]
        (only,) = deps
        return only


class Gl:
    """`gl`, as far as the kernels use it."""

    float16, bfloat16, float32, int64 = torch.float16, torch.bfloat16, torch.float32, torch.int64

    def __init__(self, machine: Machine) -> None:
        self.load, self.store = machine.load, machine.store
        self.allocate_shared_memory = machine.allocate_shared_memory
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(f"the machine has no gl.{name}")

    static_range = staticmethod(builtins.range)

    def program_id(self, axis: int) -> Block:
        """Which program this is."""
        return Block(torch.tensor(self._machine.place[axis], dtype=torch.int32))

    def num_programs(self, axis: int) -> Block:
        """How many there are."""
        return Block(torch.tensor(self._machine.programs[axis], dtype=torch.int32))

    @staticmethod
    def num_warps() -> int:
        """Of layouts, which are not looked at."""
        return 8

    @staticmethod
    def arange(start: int, stop: int, layout: Any) -> Block:
        """Whole numbers."""
        return Block(torch.arange(start, stop, dtype=torch.int32))

    @staticmethod
    def full(shape: list[int], value: float, dtype: torch.dtype, layout: Any) -> Block:
        """One value."""
        return Block(torch.full(shape, value, dtype=dtype))

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: Any) -> Block:
        """Zeros."""
        return Block(torch.zeros(shape, dtype=dtype))

    @staticmethod
    def convert_layout(x: Block, layout: Any) -> Block:
        """The same values."""
        return x

    @staticmethod
    def max(x: Block, axis: int) -> Block:
        """Largest values."""
        return Block(x.data.amax(axis))

    @staticmethod
    def sum(x: Block, axis: int) -> Block:
        """Sums."""
        return Block(x.data.sum(axis))

    @staticmethod
    def maximum(x: Block, y: Block) -> Block:
        """The larger of two."""
        return Block(torch.maximum(x.data, y.data))

    @staticmethod
    def where(condition: Block, x: Any, y: Any) -> Block:
        """One or the other."""
        return Block(torch.where(condition.data, plain(x), plain(y)))

    @staticmethod
    def exp2(x: Block) -> Block:
        """Powers of two."""
        return Block(x.data.exp2())

    @staticmethod
    def log2(x: Block) -> Block:
        """Logarithms to base two."""
        return Block(x.data.log2())


class Program:
    """Rebuilds a module's functions so that they run on a machine."""

    def __init__(self, machine: Machine, on_wait: Callable[[], None]) -> None:
        copies = types.SimpleNamespace(
            async_copy_global_to_shared=lambda b, s, mask: machine.copy(b, s, mask),
            commit_group=machine.commit_group,
            wait_group=machine.wait_group,
        )
        self.names: dict[str, Any] = {
            "gl": Gl(machine),
            "async_copy": copies,
            "cta_barrier": machine.barrier,
            "fence_async_shared": machine.fence,
            "warpgroup_mma": machine.product,
            "warpgroup_mma_init": lambda x: x,
            "warpgroup_mma_wait": lambda left, deps: machine.wait_products(left, deps),
            "wait_for_inputs": lambda overlap: on_wait(),
            "range": self.range,
        }
        self.known: dict[int, dict[str, Any]] = {}

    @staticmethod
    def range(*bounds: Any) -> Iterator[Block]:
        """A loop over values on the device."""
        for value in builtins.range(*(int(b) for b in bounds)):
            yield Block(torch.tensor(value, dtype=torch.int32))

    def function(self, jitted: Any) -> Callable[..., Any]:
        """The function of a kernel or of what it calls."""
        source = inspect.unwrap(jitted.fn)
        names = source.__globals__
        if id(names) not in self.known:
            mine = self.known[id(names)] = dict(names)
            for name, value in names.items():
                if isinstance(value, constexpr):
                    mine[name] = value.value
                elif isinstance(value, JITFunction) and name not in self.names:
                    mine[name] = self.function(value)
            mine.update(self.names)
        return types.FunctionType(source.__code__, self.known[id(names)], source.__name__)


class Launcher:
    """Stands in for a kernel: `kernel[grid](...)`."""

    def __init__(self, kernel: Any, start: Callable[[], None], on_wait: Callable[[], None],
                 machine: type[Machine]) -> None:  # fmt: skip
        self.kernel, self.start, self.on_wait, self.machine = kernel, start, on_wait, machine

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*given: Any, num_warps: int, launch_pdl: bool, **constants: Any) -> None:
            arguments = [Pointer(x) if isinstance(x, Tensor) else x for x in given]
            for second in range(grid[1]):
                for first in range(grid[0]):
                    self.start()
                    machine = self.machine(grid, (first, second))
                    program = Program(machine, self.on_wait).function(self.kernel)
                    program(*arguments, **constants)
                    if machine.products or machine.groups or machine.open:
                        raise HazardError("a program ends with work under way")

        return launch


@contextmanager
def on_cpu(
    module: Any,
    name: str,
    *,
    start: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
    machine: type[Machine] = Machine,
) -> Iterator[None]:
    """Runs a module's kernel here.

    Args:
        module: of the kernel.
        name: of the kernel in it.
        start: called before each program.
        on_wait: called when a program has waited for its predecessor.
        machine: what it runs on.
    """
    with pytest.MonkeyPatch.context() as patched:
        launcher = Launcher(getattr(module, name), start, on_wait, machine)
        patched.setattr(module, name, launcher)
        patched.setattr(module, "overlap", lambda _: {"OVERLAP": True, "launch_pdl": True})
        yield
