"""Which part of each parameter a rank holds, for every layout, without starting processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.parallel.mesh import SINGLE, Axis, Parallel
from pico_fast.parallel.slices import Slice, gather_full, local, parameter_slice, writes

COLUMN, ROW, REPLICATED = "layers.1.attention.q_proj.weight", "layers.0.swiglu.w_2.weight", "output_norm.weight"


def place(rank: int, replicate: int = 1, shard: int = 1, tp: int = 1) -> Parallel:
    """The place of ``rank`` in a mesh of these sizes."""
    return Parallel(
        rank,
        replicate * shard * tp,
        Axis(replicate, rank // (shard * tp)),
        Axis(shard, rank // tp % shard),
        Axis(tp, rank % tp),
    )


def test_overlap_and_index_agree_with_slicing():
    whole = torch.arange(5 * 6).view(5, 6)
    boxes = [
        Slice((5, 6), (row, column), (rows, columns))
        for row, column in itertools.product(range(0, 5, 2), range(0, 6, 2))
        for rows, columns in itertools.product((0, 1, 3), (2, 4))
        if row + rows <= 5 and column + columns <= 6
    ]
    everything = Slice.whole((5, 6))
    for first, second in itertools.product(boxes, repeat=2):
        inside_both = sorted(
            set(whole[everything.index(first)].flatten().tolist())
            & set(whole[everything.index(second)].flatten().tolist())
        )
        common = first.overlap(second)
        assert (common is None) == (not inside_both)
        if common is not None:
            assert common == second.overlap(first)
            assert whole[everything.index(common)].flatten().tolist() == inside_both
            piece = whole[everything.index(first)]
            assert piece[first.index(common)].flatten().tolist() == inside_both


def test_a_number_is_a_box_too():
    number = Slice.whole(())
    assert (number.numel, number.is_whole, number.overlap(number)) == (1, True, number)
    assert torch.tensor(3.0)[number.index(number)] == 3.0


def test_boxes_of_different_tensors_have_nothing_in_common():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        Slice.whole((2,)).overlap(Slice.whole((3,)))


def test_one_process_holds_everything_whatever_its_name():
    parameter = torch.zeros(3, 4)
    assert parameter_slice("not.in.the.table", parameter, SINGLE) == Slice.whole((3, 4))
    assert writes("not.in.the.table", SINGLE)
    assert local(parameter) is parameter


@pytest.mark.parametrize(("name", "dim"), [(COLUMN, 0), (ROW, 1), (REPLICATED, None)])
def test_tensor_parallel_parts(name, dim):
    whole = torch.arange(8 * 4).view(8, 4)
    for rank in range(4):
        mine = whole if dim is None else whole.chunk(4, dim)[rank]
        part = parameter_slice(name, mine, place(rank, tp=4))
        assert part.global_shape == (8, 4)
        assert torch.equal(whole[Slice.whole((8, 4)).index(part)], mine)


def test_a_name_that_the_table_has_not_is_refused():
    with pytest.raises(KeyError, match=r"attention\.new_proj"):
        parameter_slice("layers.0.attention.new_proj.weight", torch.zeros(2, 2), place(0, tp=2))


@pytest.fixture
def pretend_ranks():
    """Makes this process one rank of a world whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("name", [COLUMN, ROW, REPLICATED])
@pytest.mark.parametrize("rows", [6, 10, 26])  # 26 over 4: 7, 7, 7, 5; 10 over 4: 3, 3, 3, 1; 6 over 4: 2, 2, 2, 0
def test_every_element_has_one_writer(pretend_ranks, sizes, name, rows):
    replicate, shard, tp = sizes
    dim = tensor_parallel_dim(name)
    whole = torch.arange(rows * 4).view(rows, 4)
    written = torch.zeros_like(whole)
    for rank in range(replicate * shard * tp):
        parallel = place(rank, *sizes)
        pretend_ranks(rank, replicate * shard * tp)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        mine = whole if dim is None else whole.chunk(tp, dim)[parallel.tp.rank]
        cut = distribute_tensor(mine, mesh["dp_replicate", "dp_shard"], [Replicate(), Shard(0)], src_data_rank=None)
        part = parameter_slice(name, cut, parallel)
        index = Slice.whole((rows, 4)).index(part)
        assert part.global_shape == (rows, 4)
        assert torch.equal(whole[index], local(cut))
        if writes(name, parallel):
            written[index] += 1
    assert torch.equal(written, torch.ones_like(whole))


def test_the_only_process_exports_its_own_weights():
    model = torch.nn.Linear(3, 2)
    full = gather_full(model, SINGLE)
    assert full is not None
    assert list(full) == ["weight", "bias"]
    assert full["weight"].data_ptr() == model.weight.data_ptr()
    half = gather_full(torch.nn.Linear(3, 2).bfloat16(), SINGLE)
    assert half is not None
    assert half["weight"].dtype == torch.float32
