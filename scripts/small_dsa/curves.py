"""Loss over training time, as a picture."""

from pathlib import Path


def plot_curves(curves: list[dict], path: Path) -> None:
    """Language loss and the indexers' KL divergence over seconds of training, a colour per stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, title in zip(
        axes, ("language", "index"), ("weighted cross entropy, nats", "KL of index scores, nats")
    ):
        for stage in dict.fromkeys(point["stage"] for point in curves):
            points = [(p["seconds"], p[key]) for p in curves if p["stage"] == stage and p[key] is not None]
            if points:
                axis.plot(*zip(*points), label=stage)
        axis.set_title(title)
        axis.set_xlabel("seconds of training")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
