"""Kill, freeze and starve studies at random moments, many times over, and compare them with one left in peace.

    python -m benchmarks.crash [attacks] [seed]

`CRASH_KEEP` names a folder that keeps what a study with other numbers has left behind.
"""

from __future__ import annotations

import sys

from tests.storm import storm


def main() -> None:
    attacks = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    done, faults = storm(attacks, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{sum(done.values())} attacks: {dict(done)}")
    print("\n".join(faults) or "no completed trial lost or changed, none counted twice, every study as in peace")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
