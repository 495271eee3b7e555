"""Every bad input under two ranks: all ranks end within 10 s of the error, which is one clear line.

python -m tests.soak_bad_input       # some forty cases, about 3 minutes on 2 cores
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests import soak_common as soak
from tests.bags import write_bag
from tests.checks import TAKE
from tests.test_episodes import BAD_BAGS

BAD_SETTINGS = {
    "no such folder": ({"data__bag_dir": "/nowhere"}, ["/nowhere"]),
    "unknown key": ({"training__lrr": 1}, ["training.lrr"]),
    "text for a number": ({"training__steps": "many"}, ["training.steps"]),
    "negative batch": ({"training__batch_size": -1}, ["training.batch_size"]),
    "a share of 2": ({"data__min_used_share": 2}, ["data.min_used_share: found 2.0", "from 0 to 1"]),
    "no GPU": ({"training__device": "cuda"}, ["cuda is not available"]),
    "missing joint": ({"data__joint_names": "[a, b, c, d, e, f]"}, ["joint a, b, c, d, e, f is in none of the"]),
    "no weights": ({"model__pretrained_backbone": "/no/file.pth"}, ["/no/file.pth"]),
    "no checkpoint": ({"training__resume": "/no/checkpoint"}, ["/no/checkpoint"]),
    "not a directory": ({"training__output_dir": "/dev/null/x"}, ["training.output_dir"]),
    "no cache": ({"data__cache_dir": "/dev/null/x"}, ["data.cache_dir"]),
}


def main() -> None:
    began, slowest_s = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        good = Path(temporary) / "good" / "bags"
        write_bag(good / "a", TAKE.messages())
        cases = [(name, good, settings, words) for name, (settings, words) in BAD_SETTINGS.items()]
        for name, (make, words) in BAD_BAGS.items():
            folder = Path(temporary) / name / "bags"
            make(folder / "b")
            cases.append((name, folder, {}, words))
        for name, folder, settings, words in cases:
            run = soak.Run(folder, Path(temporary) / "runs" / name.replace(" ", "-"), ranks=2, flags=(), **settings)
            seen_s = None
            while run.alive():
                if seen_s is None and run.log.exists() and "error: " in run.log.read_text():
                    seen_s = time.monotonic()
                time.sleep(0.01)
            after_s = time.monotonic() - (seen_s or time.monotonic())
            codes, text = run.wait(), run.log.read_text().replace("\r", "\n")
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            assert codes == [1, 1] and len(lines) == 1 and "Traceback" not in text, (name, codes, text)
            assert all(word in lines[0] for word in words), (name, lines)
            assert after_s < 10, (name, after_s)
            slowest_s = max(slowest_s, after_s)
            print(f"{name}: {lines[0][:110]}", flush=True)
    print(
        f"OK: {len(cases)} cases under 2 ranks, one line each, all ranks gone at most {slowest_s:.1f} s after it; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
