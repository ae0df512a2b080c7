"""Products in 16 bits on a processor without instructions for them: quick, and no less exact."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmark_tasks import source_of
from tiny_models import random_tokens, tiny_model
from tiny_run import Place, read_json, succeed
from tolerances import CHAIN, LOGITS, assert_close
from torch.utils.checkpoint import checkpoint

from benchmarks.learning import run as learning
from benchmarks.learning.task import SOURCES
from benchmarks.repair import run as repair
from benchmarks.scores import run as scores
from bernprune.evaluation.latency import latency
from bernprune.evaluation.perplexity import mean_loss
from bernprune.models import products
from bernprune.models.loading import load_model, load_tokenizer
from bernprune.models.products import plain_products, quick_products
from bernprune.models.slicing import slice_model
from bernprune.models.view import describe
from bernprune.run.verification import save_and_verify
from bernprune.settings import merge

RANDOM = torch.Generator().manual_seed(0)
LEFT_RI, RIGHT_IO, BIAS_O = (torch.randn(*shape, generator=RANDOM) for shape in ((5, 33), (33, 7), (7,)))
Q, K, V = (torch.randn(2, 3, 11, 4, generator=RANDOM) for _ in range(3))

PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "linear": (lambda x, w, b: F.linear(x, w.T, b), (LEFT_RI, RIGHT_IO, BIAS_O)),
    "linear by name": (lambda x, w, b: F.linear(input=x, weight=w.T, bias=b), (LEFT_RI, RIGHT_IO, BIAS_O)),
    "matmul": (torch.matmul, (LEFT_RI, RIGHT_IO)),
    "method": (lambda a, b: a.matmul(b), (LEFT_RI, RIGHT_IO)),
    "operator": (lambda a, b: a @ b, (LEFT_RI, RIGHT_IO)),
    "bmm": (lambda a, b: torch.bmm(a[None], b[None]), (LEFT_RI, RIGHT_IO)),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (Q, K, V)),
}
FORMATS = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor has no instructions for 16 bits."""
    monkeypatch.setattr(products, "_processor_has", lambda name: False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The formats to which products are rounded, one a product."""
    rounded: list[torch.dtype] = []
    form = products._InFloat32._format

    def note(mode: Any, args: Any) -> torch.dtype | None:
        if (found := form(mode, args)) is not None:
            rounded.append(found)
        return found

    monkeypatch.setattr(products._InFloat32, "_format", note)
    return rounded


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_16_bits_are_those_of_float32_rounded_once(
    name: str, dtype: torch.dtype, inference: bool, counted: list[torch.dtype]
) -> None:
    take, factors = PRODUCTS[name]
    factors = tuple(factor.to(dtype) for factor in factors)
    with torch.inference_mode(inference):
        with quick_products(CPU, *FORMATS):
            found = take(*factors)
        assert found.dtype == dtype and found.equal(take(*(factor.float() for factor in factors)).to(dtype))
    assert counted == [dtype]  # or torch's own loops would have been as exact


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["linear", "operator", "attention"])
def test_so_are_those_of_gradients(name: str, dtype: torch.dtype) -> None:
    """Also where what leads to them is run forward once more."""
    take, factors = PRODUCTS[name]

    def gradients(*given: torch.Tensor, again: bool) -> list[torch.Tensor]:
        leaves = [factor.clone().requires_grad_() for factor in given]
        result = checkpoint(take, *leaves, use_reentrant=False) if again else take(*leaves)
        assert result.dtype == given[0].dtype
        result.float().square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    short = [factor.to(dtype) for factor in factors]
    with quick_products(CPU, *FORMATS):
        found = [gradients(*short, again=again) for again in (False, True)]
    assert all(one.dtype == dtype and one.equal(other) for one, other in zip(*found, strict=True))
    for grad, exact in zip(found[0], gradients(*(factor.float() for factor in short), again=False), strict=True):
        assert_close(grad, exact, CHAIN[dtype])


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_attention_keeps_what_it_goes_back_with_in_float32(dtype: torch.dtype) -> None:
    """The logarithms of its sums; and its gradients are those of float32, rounded."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    short = [factor.to(dtype) for factor in (Q, K, V)]
    long = [factor.float() for factor in short]
    with quick_products(CPU, *FORMATS):
        out, logs = forward(*short)
        found = backward(out, *short, out, logs, 0.0, False)
    assert logs.dtype == torch.float32 and logs.equal(forward(*long)[1])
    exact = backward(out.float(), *long, out.float(), logs, 0.0, False)
    assert all(one.equal(other.to(dtype)) for one, other in zip(found, exact, strict=True))


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_longer_formats_are_left_alone(name: str, dtype: torch.dtype) -> None:
    take, factors = PRODUCTS[name]
    factors = tuple(factor.to(dtype) for factor in factors)
    with quick_products(CPU, *FORMATS):
        found = take(*factors)
    assert found.dtype == dtype and found.equal(take(*factors))


@pytest.mark.usefixtures("without")
def test_tensors_of_another_class_have_their_own_way() -> None:
    """Quantised weights, say."""

    class Own(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert args[0].dtype == args[1].dtype == torch.bfloat16
            return torch.full((2, 2), 7.0)

    with quick_products(CPU, *FORMATS):
        found = torch.mm(LEFT_RI.bfloat16(), torch.Tensor._make_subclass(Own, RIGHT_IO.bfloat16()))
    assert found.equal(torch.full((2, 2), 7.0))


@pytest.mark.parametrize(
    ("told", "device", "dtypes", "expected"),
    [
        ((), "cpu", FORMATS, FORMATS),
        (("bf16",), "cpu", FORMATS, [torch.float16]),
        (("bf16", "fp16"), "cpu", FORMATS, []),
        ((), "cpu", [torch.float16, torch.float32], [torch.float16]),
        ((), "cpu", [torch.float32, torch.float64], []),
        ((), "cuda", FORMATS, []),
    ],
    ids=["neither", "one", "both", "one is asked for", "none is asked for", "a GPU"],
)
def test_nothing_changes_where_it_need_not(
    told: tuple[str, ...],
    device: str,
    dtypes: list[torch.dtype],
    expected: list[torch.dtype],
    counted: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there are instructions, where models are in other formats, and where they are not on the processor; then
    nothing is looked at, either, which would take time."""
    monkeypatch.setattr(products, "_processor_has", lambda name: any(each in name for each in told))
    if not expected:
        monkeypatch.setattr(products, "_InFloat32", None)
    with quick_products(torch.device(device), *dtypes):
        for dtype in FORMATS:
            assert (LEFT_RI.to(dtype) @ RIGHT_IO.to(dtype)).dtype == dtype
    assert counted == expected


@pytest.mark.usefixtures("without")
def test_they_end_with_the_block_and_pause_within(counted: list[torch.dtype]) -> None:
    left, right = LEFT_RI.bfloat16(), RIGHT_IO.bfloat16()
    with quick_products(CPU, *FORMATS):
        with plain_products():
            left @ right
        assert counted == []
        left @ right
    left @ right
    assert counted == [torch.bfloat16]


@pytest.mark.usefixtures("without")
def test_a_model_has_the_loss_that_it_has_elsewhere(counted: list[torch.dtype]) -> None:
    """Nearer to that of its weights in float32 than roundings are; what is timed is the model as it comes."""
    model, windows_WT = tiny_model("llama", torch.bfloat16), random_tokens(3, 11)
    exact = mean_loss(tiny_model("llama", torch.bfloat16).float(), windows_WT)
    with quick_products(CPU, *FORMATS):
        loss = mean_loss(model, windows_WT)
        products_of_a_pass = len(counted)
        assert_close(loss, exact, LOGITS[torch.bfloat16])
        latency(model, windows_WT, repeats=2)
    assert 0 < products_of_a_pass == len(counted)


@pytest.mark.usefixtures("without")
def test_what_is_saved_is_verified_as_it_is(counted: list[torch.dtype], place: Place) -> None:
    model = load_model(str(place.model), dtype="bfloat16")
    space = describe(model).space
    plan = space.plan(torch.ones(space.size, dtype=torch.bool))
    sliced, tokenizer = slice_model(model, plan), load_tokenizer(str(place.model))
    with quick_products(CPU, *FORMATS):
        save_and_verify(sliced, tokenizer, place.folder / "saved", plan, random_tokens(2, 11))
    assert counted == []


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("benchmark", "part"),
    [
        (learning, ["--method=wanda-sp", "--sequences=500"]),
        (scores, ["--score=magnitude"]),
        (repair, ["--plan=wanda-sp", "--repair=bias"]),
    ],
    ids=["learning", "scores", "repair"],
)
def test_benchmarks_that_run_masks_without_a_run_are_quick(
    benchmark: ModuleType, part: list[str], counted: list[torch.dtype], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(place)
    short = replace(source, config=merge(source.config, {"model": {"dtype": "bfloat16"}}))
    monkeypatch.setitem(SOURCES, "tiny", short)
    for name, fewer in (("WINDOWS", 20), ("JUDGING", 6)):
        monkeypatch.setattr(repair, name, fewer)
    benchmark.main(["--model=tiny", "--sparsity=0.3", "--seed=0", *part, f"--folder={place.folder}"])
    assert counted and (place.folder / "results.jsonl").read_text().count("\n") >= 1


@pytest.mark.usefixtures("without")
def test_a_run_is_quick_and_so_is_the_rest(counted: list[torch.dtype], place: Place) -> None:
    """From the first score to the last evaluation, and so are other commands; the clean process knows nothing of it."""
    succeed(*place.prune("model.dtype=bfloat16", "repair.method=ridge", "repair.windows=16"))
    assert counted and read_json(place.out / "report.json")["verified"]["max_logit_difference"] == 0
    own = ("--text", str(place.text), "--set", "data.window=16", "--set", "model.dtype=bfloat16")
    applied, recovered = place.folder / "applied", place.folder / "recovered"
    for command in (
        ("evaluate", str(place.out / "model"), "--text", str(place.text), "--window", "16", "--tokens", "320"),
        ("apply", str(place.out / "plan.json"), str(place.model), str(applied), "--repair=ridge", *own),
        ("recover", str(place.out), str(recovered), "--set", "recover.tokens=256"),
        ("scores", str(place.model), *own),
        ("units", str(place.model), *own[2:]),
    ):
        counted.clear()
        succeed(*command)
        assert counted, command[0]
