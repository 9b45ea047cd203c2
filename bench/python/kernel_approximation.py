"""How well feature maps stand for softmax attention: error against the number of features, and on a model's heads.

    python -m bench.python.kernel_approximation [--quick] [--out bench/results/kernel-approximation]

Two experiments. *Rates*: the error of phi(q) . phi(k) against exp(q . k) at fixed random pairs, root mean square over
pairs and draws, for every way of drawing frequencies, with the slope of its logarithm against that of the number of
features: -1/2 is Monte Carlo's rate, -1 what is claimed for quasi-Monte Carlo (arXiv 2403.19928 cites it, for features
whose directions are the rows of one DCT). *Heads*: every named map at several temperatures and sizes on the bundled
model's queries and keys.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from freqrank._progress import bar
from freqrank.attention import kernel_error
from freqrank.attention.feature_maps import FEATURE_MAPS, FeatureMap, FeatureMapKind, pretrained_temperature
from freqrank.report import machine

PRF = FEATURE_MAPS["prf"].prefactor
#: name -> how frequencies are drawn; all are estimates of exp(q . k)
SAMPLINGS = {
    "independent": FeatureMapKind("exp", "gaussian", points="random", prefactor=PRF),
    "stratified": FeatureMapKind("exp", "gaussian", points="stratified", prefactor=PRF),
    "Halton": FeatureMapKind("exp", "gaussian", points="halton", prefactor=PRF),
    "Sobol": FeatureMapKind("exp", "gaussian", points="sobol", prefactor=PRF),
    "Sobol on the sphere": FeatureMapKind("exp", "sphere", points="sobol", prefactor=PRF),
    "orthogonal": FeatureMapKind("exp", "orthogonal", points="random", prefactor=PRF),
    "signs and DCT": FeatureMapKind("exp", "idct", "chi", "random", signs=True, prefactor=PRF),
    "signs and DCT, Sobol radii": FeatureMapKind("exp", "idct", "chi", "sobol", signs=True, prefactor=PRF),
}


def draw(kind: FeatureMapKind | str, dim: int, count: int, seed: int, temperature: float | str = 1.0) -> FeatureMap:
    """A feature map with its numbers drawn."""
    fmap = FeatureMap(dim, kind, num_frequencies=count, temperature=temperature)
    fmap.reset_parameters(torch.Generator().manual_seed(seed))
    return fmap


@torch.no_grad()
def relative_error(kind: FeatureMapKind, dim: int, count: int, draws: int, length: float) -> tuple[float, float]:
    """Root mean square over draws and 64 pairs of (estimate / exp(q . k) - 1), and the root mean square of its bias.

    Vectors point anywhere and are ``length`` long: the variance of an estimate grows as exp(|q + k|^2), and of vectors
    of random lengths the longest would decide alone.
    """
    normal = torch.randn(2, 64, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    q, k = torch.nn.functional.normalize(normal, dim=-1) * length
    exact = (q * k).sum(-1).exp()
    off = torch.stack(
        [(f.features(q) * f.features(k)).sum(-1) / exact - 1 for f in (draw(kind, dim, count, s) for s in range(draws))]
    )
    return off.square().mean().sqrt().item(), off.mean(0).square().mean().sqrt().item()


def slope(counts: list[int], errors: list[float]) -> float:
    """Least-squares slope of log error against log count."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def rates(quick: bool) -> list[dict[str, Any]]:
    problems = [(2, 0.5), (2, 1.0), (8, 1.0), (32, 1.0)] if not quick else [(2, 1.0)]
    counts = [16, 32, 64, 128, 256, 512, 1024, 2048] if not quick else [16, 64]
    draws = 30 if not quick else 4
    rows = []
    with bar("rates", len(problems) * len(SAMPLINGS) * len(counts), True) as advance:
        for dim, length in problems:
            for name, kind in SAMPLINGS.items():
                errors, biases = [], []
                for count in counts:
                    error, bias = relative_error(kind, dim, count, draws, length)
                    errors.append(error)
                    biases.append(bias)
                    advance("")
                rows.append(
                    {"dim": dim, "length": length, "sampling": name, "counts": counts, "errors": errors,
                     "biases": biases, "slope": slope(counts, errors), "draws": draws}
                )  # fmt: skip
    return rows


def heads(quick: bool) -> list[dict[str, Any]]:
    import freqrank
    from freqrank.data import stdlib_bytes, windows
    from freqrank.models.heads import attention_heads
    from transformers import AutoModelForCausalLM

    folder = Path(freqrank.__file__).parent / "bundled" / "base"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = attention_heads(model, windows(stdlib_bytes("validation"), 256 if not quick else 32, 2, seed=1))
    dim = found[0].q.shape[-1]
    factors = (0.5, 1.0, 2.0) if not quick else (1.0,)
    counts = (dim, 4 * dim) if not quick else (dim,)
    seeds = range(3 if not quick else 1)
    rows = []
    with bar("heads", len(FEATURE_MAPS) * len(counts) * (len(factors) + 1), True) as advance:
        for name, kind in FEATURE_MAPS.items():
            restored = pretrained_temperature(kind, dim)
            for count in counts:
                for temperature in sorted({1.0, *(restored * f for f in factors)}):
                    errors = [
                        kernel_error(draw(name, dim, count, seed, temperature), h.q, h.k, h.v, scale=h.scale)
                        for seed in seeds
                        for h in found
                    ]
                    rows.append(
                        {"feature_map": name, "frequencies": count, "temperature": temperature,
                         "restored": math.isclose(temperature, restored),
                         **{key: sum(e.to_dict()[key] for e in errors) / len(errors) for key in errors[0].to_dict()}}
                    )  # fmt: skip
                    advance("")
    return rows


def plot(document: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = sorted({(row["dim"], row["length"]) for row in document["rates"]})
    figure, axes = plt.subplots(1, len(problems), figsize=(4.5 * len(problems), 4.5), squeeze=False, sharey=True)
    for axis, (dim, length) in zip(axes[0], problems, strict=True):
        for row in (r for r in document["rates"] if (r["dim"], r["length"]) == (dim, length)):
            axis.loglog(row["counts"], row["errors"], ".-", label=f"{row['sampling']} ({row['slope']:.2f})")
        axis.set_title(f"{dim} channels, vectors of length {length:g} (fitted slope)", fontsize=9)
        axis.set_xlabel("features")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("relative error of the estimate of exp(q . k)")
    figure.tight_layout()
    figure.savefig(folder / "rates.png", dpi=110)
    plt.close(figure)


def tables(document: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [f"On {document['machine'].get('cpu', {}).get('model', 'this machine')}.", ""]
    problems = sorted({(row["dim"], row["length"]) for row in document["rates"]})
    last = document["rates"][0]["counts"][-1]
    lines += [
        "Slope of log error against log features; error and bias at the last number of features, " + f"{last}.",
        "",
        "| frequencies | " + " | ".join(f"{dim} channels, length {length:g}" for dim, length in problems) + " |",
        "|---" * (1 + len(problems)) + "|",
    ]
    for name in SAMPLINGS:
        cells = []
        for problem in problems:
            (row,) = (r for r in document["rates"] if (r["dim"], r["length"]) == problem and r["sampling"] == name)
            cells.append(f"{row['slope']:.2f}; {row['errors'][-1]:.2g}, {row['biases'][-1]:.2g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| map | frequencies | temperature | total variation (of uniform rows) | output error | slope | correlation |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(document["heads"], key=lambda r: r["total_variation"]):
        mark = " (restored)" if r["restored"] else ""
        lines.append(
            f"| {r['feature_map']} | {r['frequencies']} | {r['temperature']:.2f}{mark} | {r['total_variation']:.3f} "
            f"({r['uniform']:.3f}) | {r['output']:.3f} | {r['slope']:.2f} | {r['correlation']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, for a test; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernel-approximation"))
    args = parser.parse_args()
    document = {"machine": machine(), "rates": rates(args.quick), "heads": heads(args.quick)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / "RESULTS.md").write_text(tables(document))
    plot(document, args.out)
    print(tables(document))


if __name__ == "__main__":
    main()
