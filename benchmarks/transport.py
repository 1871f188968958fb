# SPDX-License-Identifier: Apache-2.0
"""Transport of a batch: 16 images x 8 keypoints x 10 x 10 votes in one call, beside geomloss image by image.

geomloss (pip install geomloss; no dependency of ours) is how the published code of ADLP does it: unbalanced Sinkhorn
divergence, p = 2, blur 0.001, reach 0.5, unnormalised masses. Both values stand beside that of POT's exact solution of
the unregularised problem. Memory is the growth of a process of its own for batches of 256 and 1024 images.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import interleaved_ms, machine, ratio, summary, table, use_two_cores, write  # noqa: E402

IMAGES, KEYPOINTS, VOTES = 16, 8, 10
BLUR, REACH = 1e-3, 0.5


def problem(images: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Return student votes, teacher votes [B,K,V,2] (fractions of the image) and their masses [B,K,V]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(images, KEYPOINTS, 1, 2, generator=generator)
    shape = (images, KEYPOINTS, VOTES, 2)
    x = centre + 0.02 * torch.randn(shape, generator=generator)
    y = centre + 0.01 + 0.01 * torch.randn(shape, generator=generator)
    a = (0.4 + 0.5 * torch.rand(images, 1, VOTES, generator=generator)).expand(images, KEYPOINTS, VOTES)
    b = (0.6 + 0.4 * torch.rand(images, 1, VOTES, generator=generator)).expand(images, KEYPOINTS, VOTES)
    return x, y, a.contiguous(), b.contiguous()


def ours(x: Any, y: Any, a: Any, b: Any, iterations: int) -> Any:
    """Return the divergences [B,K] of all problems, solved in one call, with their gradient taken."""
    from ukd_ros.distillation.transport import TransportOptions, divergence, squared_distance

    x = x.clone().requires_grad_(True)
    options = TransportOptions(blur=BLUR, reach=REACH, scaling=0.25, iterations=iterations)
    value = divergence(squared_distance(x, y), squared_distance(x, x), squared_distance(y, y), a, b, options).value
    value.sum().backward()  # type: ignore[no-untyped-call]
    return value.detach()


def theirs(x: Any, y: Any, a: Any, b: Any) -> Any:
    """Return geomloss' divergences [B,K], image by image, with their gradient taken."""
    import torch
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=BLUR, reach=REACH, backend="tensorized")
    values = []
    for i in range(len(x)):
        points = x[i].clone().requires_grad_(True)
        value = loss(a[i], points, b[i], y[i])
        value.sum().backward()
        values.append(value.detach())
    return torch.stack(values)


def growth_mb(images: int) -> float:
    """Return by how much solving `images` images grows a fresh process, MB."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import transport; transport.grow({images})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(said.stdout)


def grow(images: int) -> None:
    """Print the growth of this process, MB."""
    ours(*problem(1), 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(*problem(images), 20)
    sys.stdout.write(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}\n")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write results/transport.json."""
    parser = argparse.ArgumentParser(prog="ukd bench transport", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default %(default)s)")
    parser.add_argument("--iterations", type=int, default=20, help="at the last blur (default %(default)s)")
    options = parser.parse_args(arguments)
    use_two_cores()
    about = machine()
    given = problem(IMAGES)
    exact = ours(*given, 20_000)
    runs = {"ours, one call": lambda: ours(*given, options.iterations)}
    found: dict[str, Any] = {"ours, one call": runs["ours, one call"]()}
    try:
        found["geomloss, image by image"] = theirs(*given)
        runs["geomloss, image by image"] = lambda: theirs(*given)
    except ImportError:
        sys.stdout.write("geomloss is not installed: pip install geomloss to compare with it\n")
    times = interleaved_ms(runs, options.rounds)
    first = next(iter(runs))
    rows, result = [], {}
    for name in runs:
        off = float(((found[name] - exact).abs() / exact.abs()).max())
        result[name] = {**summary(times[name]), "ratio": ratio(times, name, first), "largest_error": off}
        rows.append((name, f"{result[name]['median_ms']:.1f} ms", f"{result[name]['ratio']:.1f} x, off by {off:.2%}"))
    small, large = growth_mb(16 * IMAGES), growth_mb(64 * IMAGES)
    rows.append(("memory, 256 and 1024 images", f"{small:.0f} and {large:.0f} MB", f"{large / max(small, 0.1):.1f} x"))
    data = {"machine": about, "runs": result, "growth_mb": {16 * IMAGES: small, 64 * IMAGES: large}}
    path = write("transport", data)
    sys.stdout.write(table(rows, about) + f"\nwritten: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
