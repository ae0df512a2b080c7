"""Products, sums and losses under masks.

Installed, they lie beside this file; in a checkout, in the top-level folder ``kernels``.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file():  # without this test we would find a neighbour called kernels in site-packages
    __path__ = [str(_checkout / "kernels")]
