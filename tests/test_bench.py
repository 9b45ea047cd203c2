"""The benchmark runner: what is wrong gets no time, files of results keep their form, every family runs."""

import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from freqrank.ops import reference

from bench.python import cpp, machine, results, run
from bench.python.families import dct, linear_attention, lowrank
from bench.python.measure import COPY, MATMUL, MATMUL_SIZE, measure, relative_error, with_memory
from bench.python.registry import Case, Family, NotApplicable, families

CPU = torch.device("cpu")


def toy_case(**changes):
    fields = {
        "op": "double",
        "shape": (64, 8),
        "dtype": "float32",
        "n": 8,
        "series": "toys",
        "bytes": 2 * 64 * 8 * 4,
        "tolerance": 1e-6,
        "inputs": lambda case, generator, device: (torch.randn(case.shape, generator=generator),),
        "reference": lambda case, x: 2 * x.double(),
        **changes,
    }
    return Case(**fields)


def toy_family(cases=(), **implementations):
    family = Family("toys", "Toys", "n", lambda device: cases)
    for name, function in {"freqrank": lambda x: 2 * x, **implementations}.items():
        family.implementation(name)(lambda case, *inputs, function=function: function)
    return family


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(machine, "cpu_cache_bytes", lambda: 1 << 12)


def measured(family, case, **options):
    rows, left_out = measure(case, family.implementations, CPU, seconds=0, rounds=(2, 3), **options)
    return {row["implementation"]: row for row in rows}, left_out


def test_right_results_are_timed_and_wrong_ones_refused():
    family = toy_family(
        right=lambda x: x + x,
        wrong=lambda x: 2.001 * x,
        not_finite=lambda x: 2 * x / 0,
        other_shape=lambda x: 2 * x[:1],
        destroys_its_input=lambda x: x.mul_(2),
    )
    rows, _ = measured(family, toy_case())
    assert set(rows) == {"freqrank", "right", "wrong", "not_finite", "other_shape", "destroys_its_input", COPY}
    for name in ("freqrank", "right"):
        assert rows[name]["seconds"] > 0
        assert rows[name]["ratio"] > 0
        assert rows[name]["fraction_of_copy"] > 0
        assert rows[name]["error"] <= 1e-7
    assert rows["freqrank"]["ratio"] == 1
    for name in ("wrong", "not_finite", "other_shape", "destroys_its_input"):
        assert "wrong" in rows[name]["refused"]
        assert "seconds" not in rows[name]


def test_what_cannot_be_measured_says_why():
    family = toy_family(broken=lambda x: x.no_such_method())
    family.implementation("absent", needs=("no_such_module",))(lambda case, x: None)

    @family.implementation("choosy")
    def _(case, x):
        raise NotApplicable("takes no toys")

    rows, left_out = measured(family, toy_case())
    assert set(rows) == {"freqrank", COPY}
    assert left_out["absent"] == "no_such_module cannot be imported"
    assert left_out["choosy"] == "takes no toys"
    assert left_out["broken"].startswith("fails: AttributeError")


def test_a_failure_of_the_library_itself_is_a_row(tmp_path, monkeypatch):
    family = toy_family(right=lambda x: x + x)
    family.implementations[0] = dataclasses.replace(family.implementations[0], prepare=lambda case, x: x.no_such_method)
    rows, _ = measured(family, toy_case())
    assert "no_such_method" in rows["freqrank"]["refused"]
    assert rows["right"]["ratio"] is None
    monkeypatch.setattr(run, "families", lambda: {"toys": family})
    family._cases = lambda device: [toy_case()]
    assert run.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 1
    assert "no_such_method" in (tmp_path / results.SUMMARY).read_text()


def test_an_implementation_of_something_else_is_checked_against_its_own_definition():
    family = toy_family()
    family.implementation("triple", reference=lambda case, x: 3 * x.double())(lambda case, x: lambda x: 3 * x)
    family.implementation("not triple", reference=lambda case, x: 3 * x.double())(lambda case, x: lambda x: 2 * x)
    rows, _ = measured(family, toy_case())
    assert "seconds" in rows["triple"]
    assert "refused" in rows["not triple"]


def test_stated_operations_are_put_beside_a_matrix_product():
    rows, _ = measured(toy_family(), toy_case(flops=64 * 8))
    assert rows[MATMUL]["flops_per_second"] > 0
    # a median of ratios, not the ratio of the medians: on a busy machine the two are far apart
    assert rows["freqrank"]["fraction_of_matmul"] > 0
    assert "fraction_of_matmul" not in measured(toy_family(), toy_case())[0]["freqrank"]


MIB = 1 << 20


def block(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.int8)


def test_memory_is_the_peak_of_a_call_to_the_byte():
    kept = [block(7)]

    def call():
        kept[0] = None  # what was there before the call counts neither way
        kept[0] = block(2)
        first = block(1)
        for _ in range(5):  # given back each time
            block(4)
        return first, block(3)

    result, memory = with_memory(call, CPU)
    assert [len(tensor) for tensor in result] == [MIB, 3 * MIB]
    assert memory == (2 + 1 + 4) * MIB
    assert with_memory(lambda: None, CPU)[1] == 0


def test_memory_of_arrays_is_counted_where_numpy_takes_it():
    def call():
        array = np.ones(4 * MIB, np.int8)
        return torch.from_numpy(array + 1).clone()

    assert with_memory(call, CPU)[1] == 4 * MIB
    assert 0 <= with_memory(call, CPU, arrays=True)[1] - (4 + 8) * MIB < MIB / 8


def test_rows_have_the_memory_of_a_call():
    case = toy_case(flops=1)
    x_bytes = case.bytes // 2
    family = toy_family(right=lambda x: x + x, wasteful=lambda x: torch.stack([x, x, x]).sum(0).sub_(x))
    prepared = torch.empty(case.shape)
    family.implementation("prepared")(lambda case, x: lambda x: torch.add(x, x, out=prepared))
    family.implementation("NumPy", convert=lambda x: x.numpy())(lambda case, x: lambda x: 2 * x)
    rows, _ = measured(family, case)
    assert rows["right"]["memory"] == x_bytes
    assert rows["wasteful"]["memory"] == 4 * x_bytes
    assert rows["prepared"]["memory"] == rows[COPY]["memory"] == 0
    assert rows[MATMUL]["memory"] == 4 * MATMUL_SIZE["cpu"] ** 2
    assert x_bytes <= rows["NumPy"]["memory"] < x_bytes + MIB / 8


def test_memory_of_the_transforms_includes_scipys_result():
    pytest.importorskip("scipy")
    family = families()["dct"]
    case = next(case for case in family.cases("cpu") if case.quick and case.dtype == "float32")
    peers = [each for each in family.implementations if each.name in ("freqrank", "scipy.fft")]
    rows, _ = measure(case, peers, CPU, seconds=0, rounds=(1, 1))
    for name in ("freqrank", "scipy.fft"):
        [memory] = [row["memory"] for row in rows if row["implementation"] == name]
        assert case.bytes / 2 <= memory < case.bytes


def test_relative_error_of_tuples_is_that_of_the_worst():
    one = torch.ones(4, dtype=torch.float64)
    assert relative_error((one, one * 1.5), (one, one)) == 0.5
    assert relative_error(one, (one, one)) == math.inf
    assert relative_error(one * math.nan, one) == math.inf


def test_a_case_and_an_implementation_have_one_name_each():
    family = toy_family([toy_case(), toy_case()])
    with pytest.raises(ValueError, match="double 64x8 float32"):
        family.cases("cpu")
    with pytest.raises(ValueError, match="'freqrank'"):
        family.implementation("freqrank")(lambda case, x: None)


@pytest.fixture
def document():
    cases = [toy_case(n=n, shape=(16, n), options={"n": n}) for n in (4, 8, 16, 32)]
    family = toy_family(right=lambda x: x + x, wrong=lambda x: x)
    return run.run_family(family, cases, CPU, seconds=0, quick=True)


def test_results_keep_their_schema(document, tmp_path):
    path = results.write(tmp_path, "machine-toys", document)
    loaded = json.loads(path.read_text())
    results.check(loaded)
    assert len(loaded["rows"]) == 4 * 4
    assert loaded["settings"]["threads"] == torch.get_num_threads()
    assert loaded["versions"]["torch"] == torch.__version__
    assert loaded["machine"]["cpu"]
    del loaded["rows"][0]["seconds"]
    with pytest.raises(ValueError, match=r"seconds is 'missing'"):
        results.check(loaded)
    with pytest.raises(ValueError, match="schema is 0"):
        results.check({**document, "schema": 0})


def test_the_summary_is_made_from_the_files_alone(document, tmp_path):
    results.write(tmp_path, "machine-toys", document)
    counters = {"title": "Counters", "rows": [{"kernel": "k", "bytes_read": 32}, {"kernel": "l", "estimate": 0.51}]}
    (tmp_path / "toys-counters.json").write_text(json.dumps(counters))
    text = results.render(tmp_path)
    assert text == results.render(tmp_path)
    assert run.main(["--render", "--out", str(tmp_path)]) == 0
    again = (tmp_path / results.SUMMARY).read_text()
    assert run.main(["--render", "--out", str(tmp_path)]) == 0
    assert again == (tmp_path / results.SUMMARY).read_text()
    assert "| double n=8 16x8 float32 |" in text
    assert "wrong" in text
    assert "| kernel | bytes read | estimate |" in text
    assert "| l |  | 0.51 |" in text


def test_memory_is_shown_where_it_is_known(document, tmp_path):
    results.write(tmp_path, "machine-toys", document)
    text = results.render(tmp_path)
    assert "| case | freqrank | of copy | error | MiB | right | wrong |" in text
    in_brackets = re.findall(r"\(0e\+00, 0\.000244 MiB\)", text)
    assert len(in_brackets) == 1  # the one case of 16 x 4
    assert re.search(r"^\| double n=4 16x4 float32 \| cpu \| right \| .* \| 0\.000244 \|$", text, re.MULTILINE)

    def rendered_without(names):
        rows = [dict(row) for row in document["rows"]]
        for row in rows:
            if row["implementation"] in names:
                row.pop("memory", None)
        results.write(tmp_path, "machine-toys", {**document, "rows": rows})
        return results.render(tmp_path)

    text = rendered_without({"right", COPY})
    assert "| error | MiB | right | wrong |" in text
    assert "(0e+00)" in text
    text = rendered_without({"freqrank", "right", COPY})
    assert "| case | freqrank | of copy | error | right | wrong |" in text
    assert "| MiB" not in text
    assert "(0e+00)" in text


def test_plots(document, tmp_path):
    pytest.importorskip("matplotlib")
    results.write(tmp_path, "machine-toys", document)
    [path] = results.plot(tmp_path)
    assert path.name == "machine-toys-toys.png"
    assert "![Toys, toys](machine-toys-toys.png)" in results.render(tmp_path)


@pytest.mark.parametrize("n", [2, 3, 8, 9])
@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_the_transforms_definition_is_the_matrix(type, n):
    family = families()["dct"]
    case = next(case for case in family.cases("cpu") if case.options == {"type": type} and case.op == "dct")
    x = torch.randn(5, n, dtype=torch.float64)
    want = x @ reference.dct_matrix(type, n, None if type == 1 else "ortho").T
    assert relative_error(dct.reference(case, x), want) < 1e-14


@pytest.mark.parametrize("decay", [False, True])
def test_attentions_definition_is_the_twin(decay):
    case = next(iter(families()["linear_attention"].cases("cpu")))
    case = dataclasses.replace(case, shape=(2, 37, 3, 4), options={"decay": "head"} if decay else {})
    q, k, v, g = case.inputs(case, torch.Generator().manual_seed(0), CPU)
    assert (g is not None) == decay
    want = reference.linear_attention(q, k, v, log_decay=g)[0]
    assert relative_error(linear_attention.reference(case, q, k, v, g, block=16), want) < 1e-14


def test_a_case_may_measure_errors_of_its_own():
    family = toy_family(right=lambda x: x + x, wrong=lambda x: 3 * x)
    rows, _ = measured(family, toy_case(error=lambda result, reference: float(abs(result - reference).max()) * 7))
    assert rows["right"]["error"] == 0
    assert rows["wrong"]["error"] > 7
    assert "wrong: error" in rows["wrong"]["refused"]
    family.implementation("triple", reference=lambda case, x: 3 * x.double())(lambda case, x: lambda x: 3 * x)
    rows, _ = measured(family, toy_case(error=lambda result, reference: 1.0))
    assert rows["triple"]["error"] < 1e-6  # its own definition, compared as usual


def test_excess_loss_of_factors():
    for data in ("mild", "massive"):
        [case] = [case for case in families()["lowrank"].cases("cpu") if case.n == 128 and case.options["data"] == data]
        x, weights = case.inputs(case, torch.Generator().manual_seed(0), CPU)
        reference = lowrank.reference(case, x, weights)
        makers = [each for each in lowrank.family.implementations if each.reference is None]
        found = {each.name: each.prepare(case, x, weights)(x, weights) for each in makers}
        excess = {name: lowrank.excess(factors, reference) for name, factors in found.items()}
        assert excess["freqrank"] < 1e-13
        assert excess["float64 throughout"] < 1e-13
        for name in ("recipe of SVD-LLM", "recipe of Basis Sharing"):
            assert (1 if data == "massive" else 1e-9) < excess[name] < (100 if data == "massive" else 1e-6)
        basis, coefficients = found["freqrank"]
        assert lowrank.excess((basis * math.nan, coefficients), reference) == math.inf


def test_the_optimum_from_a_gram_matrix_is_that_from_the_outputs(monkeypatch):
    for n, outputs in ((40, 60), (40, 10)):
        options = {"layers": 2, "rank": 8, "data": "mild"}
        case = toy_case(shape=(400, n, outputs), n=n, options=options)
        x, weights = lowrank._inputs(case, torch.Generator().manual_seed(0), CPU)
        least = lowrank.reference(case, x, weights)[2]
        with monkeypatch.context() as patch:
            patch.setattr(lowrank, "EXACT_ORDER", 1)
            torch.testing.assert_close(lowrank.reference(case, x, weights)[2], least, rtol=1e-9, atol=0)


def test_repetitions_of_a_cpp_benchmark_become_a_row():
    name = "dct/cuda/type 2 64x32 float32/min_time:0.010/repeats:3/manual_time"
    common = {"name": name, "run_type": "iteration", "time_unit": "us", "iterations": 7, "n": 32.0, "bytes": 16384.0}
    repetitions = [{**common, "real_time": t, "of_copy": 1 / t} for t in (4.0, 2.0, 3.0)]
    aggregate = {**common, "run_type": "aggregate", "real_time": 99.0, "of_copy": 99.0}
    failed = {**common, "name": "dct/cpu/broken float32", "error_occurred": True, "error_message": "no kernel"}
    row, refused = cpp._rows({"benchmarks": [*repetitions, aggregate, failed]})
    assert (row["case"], row["device"], row["n"], row["bytes"]) == ("dct type 2 64x32 float32", "cuda", 32, 16384)
    assert row["seconds"] == pytest.approx(3e-6)
    assert row["fraction_of_copy"] == pytest.approx(1 / 3)
    assert refused["refused"] == "fails: no kernel"
    results.check(run.document("cpp", "C++", "n", [row, refused], CPU, quick=True))


def _process(case, number):
    return lambda number: bytearray(50_000_000)


def _broken(case, number):
    return lambda number: 1 // 0


def _dead(case, number):
    return lambda number: os._exit(7)


def _impossible(case, number):
    raise NotApplicable("not today")


def _three(case, generator, device):
    return (3,)


def _length(result, reference):
    return abs(len(result) - reference) / 1e9


def _fifty_million(case, number):
    return 50_000_000


def test_calls_alone_have_the_memory_of_their_process():
    case = toy_case(alone=True, inputs=_three, error=_length, reference=_fifty_million)
    family = Family("toys", "Toys", "n", lambda device: [case])
    for name, prepare in {
        "freqrank": _process, "broken": _broken, "dead": _dead, "impossible": _impossible,
    }.items():  # fmt: skip
        family.implementation(name)(prepare)
    rows, left_out = measured(family, case)
    assert rows["freqrank"]["samples"] == 1
    assert 50_000_000 <= rows["freqrank"]["memory"] < 60_000_000
    assert rows["freqrank"]["error"] == 0
    assert rows["broken"]["refused"] == "fails: ZeroDivisionError: integer division or modulo by zero"
    assert rows["dead"]["refused"] == "fails: its process ended with code 7"
    assert left_out == {"impossible": "not today"}
    document = run.document("toys", "Toys", "n", [], CPU, quick=True)
    about = {"case": case.name, "op": "double", "shape": [64, 8], "dtype": "float32", "options": {}, "device": "cpu"}
    document["rows"] = [{**about, "n": 8, "series": "toys", "bytes": 1, **row} for row in rows.values()]
    results.check(document)


def test_every_family_has_its_cases_and_its_baseline():
    for name, family in families().items():
        assert family.name == name
        assert family.implementations[0].name == "freqrank"
        for device in ("cpu", "cuda"):
            cases = family.cases(device)
            assert any(case.quick for case in cases)
            assert all(case.bytes > 0 and (case.tolerance < 0.1 or case.error) for case in cases)


@pytest.mark.parametrize("name", sorted(families()))
def test_the_runner_ends_to_end(name, tmp_path, monkeypatch):
    """On the family's smallest quick case, shrunk where that is easy."""
    family = families()[name]
    smallest = min((case for case in family.cases("cpu") if case.quick), key=lambda case: math.prod(case.shape))
    monkeypatch.setattr(Family, "cases", lambda self, device: [smallest])
    monkeypatch.setitem(MATMUL_SIZE, "cpu", 64)
    threads = torch.get_num_threads()
    try:
        options = ["--quick", "--family", name, "--device", "cpu", "--threads", "1", "--minutes", "0"]
        assert run.main([*options, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    [loaded] = results.load(tmp_path).values()
    assert loaded["settings"]["threads"] == 1
    timed = [row for row in loaded["rows"] if "seconds" in row]
    found = {row["implementation"] for row in timed}
    assert found == {"freqrank"} if smallest.alone else {"freqrank", COPY} < found
    assert not [row for row in loaded["rows"] if "refused" in row]
    assert (tmp_path / results.SUMMARY).exists()
