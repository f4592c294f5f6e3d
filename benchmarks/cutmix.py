"""CutMix against timm's and torchvision's on the same batch of 128 x 3 x 224 x 224, side by side in one run.

Two ways: the batch is there and is mixed; or 128 samples are collated to a mixed batch (for timm and torchvision by
torch's own collate and then theirs, as their documentation has it). The arms take turns, and ratios are medians of
paired rounds. timm's other collate, FastCollateMixup, takes NumPy images of uint8 and is compared on such. All mix
each batch with alpha 1 and give soft targets over 1,000 classes; boxes differ from draw to draw, so that every arm
sees many. timm and torchvision pull another torch: install them apart, with --no-deps, and run this file with that
Python, in whose site-packages a .pth file adds those of salience:

    python -m venv --without-pip /tmp/rivals
    pip install --no-deps --target RIVALS timm torchvision       # RIVALS, SALIENCE: the two site-packages
    echo "import site; site.addsitedir('SALIENCE')" > RIVALS/salience.pth
    /tmp/rivals/bin/python benchmarks/cutmix.py [--rounds 40] [--out FILE]

Where torchvision's compiled operators do not fit the torch that is there, their names are declared (never run), so
that its Python part, which CutMix is, can be imported.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import default_collate

import salience as sal
from salience.core.evidence import about

CLASSES, SHAPE = 1000, (128, 3, 224, 224)
OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
    "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align", "deform_conv2d",
    "_deform_conv2d_backward",
)  # fmt: skip


def rivals():
    """What timm and torchvision offer, by name; and the library in which operators had to be declared, if so."""
    declared = None
    try:
        import torchvision
    except RuntimeError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            declared.define(f"{name}(Tensor a) -> Tensor")
        import torchvision
    import timm
    from timm.data.mixup import FastCollateMixup, Mixup
    from torchvision.transforms import v2

    settings = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "num_classes": CLASSES}
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    mixes = {"timm": Mixup(**settings), "torchvision": v2.CutMix(num_classes=CLASSES)}
    return mixes, FastCollateMixup(**settings), versions, declared


def timed(function, *given):
    started = time.perf_counter()
    function(*given)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    others, fast, versions, declared = rivals()
    images, labels = torch.rand(SHAPE), torch.randint(0, CLASSES, SHAPE[:1])
    samples = list(zip(images.unbind(), labels.tolist()))
    method, random = sal.CutMix(), torch.Generator().manual_seed(0)
    collate = method.collate(classes=CLASSES)

    def ours(inplace):
        return lambda x, y: method(x, y, generator=random, inplace=inplace).targets(CLASSES)

    # timm writes into the batch, torchvision into a copy of it; each is compared with ours of the same kind
    mixing = {"salience in place": ours(True), "timm": others["timm"]}
    mixing |= {"salience": ours(False), "torchvision": others["torchvision"]}
    collating = {"salience collate": collate}
    for name, mix in others.items():
        collating[f"{name} collate"] = lambda given, mix=mix: mix(*default_collate(given))
    small = [((one * 255).to(torch.uint8).numpy(), label) for one, label in samples]
    collating |= {"salience collate of uint8": collate, "timm FastCollateMixup": fast}
    times = {name: [] for name in (*mixing, *collating)}
    for index in range(args.rounds + 3):
        for name, mix in mixing.items():
            spent = timed(mix, images, labels)
            if index >= 3:
                times[name].append(spent)
        for name, make in collating.items():
            spent = timed(make, small if "uint8" in name or make is fast else samples)
            if index >= 3:
                times[name].append(spent)
    pairs = {
        "timm": "salience in place", "torchvision": "salience",
        "timm collate": "salience collate", "torchvision collate": "salience collate",
        "timm FastCollateMixup": "salience collate of uint8",
    }  # fmt: skip
    rows = {name: {"ms": 1e3 * statistics.median(taken)} for name, taken in times.items()}
    for name, mine in pairs.items():
        speed = [theirs / own for theirs, own in zip(times[name], times[mine])]
        rows[name][f"{mine}: times as fast"] = statistics.median(speed)
    for name, row in rows.items():
        print(f"{name}: " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    note = "torchvision's operators declared, not loaded" if declared is not None else ""
    print(versions, note)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python benchmarks/cutmix.py --rounds {args.rounds}"
        found = {"command": command, "about": {**about("cpu"), **versions, "note": note}, "arms": rows}
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
