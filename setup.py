"""Where the packages lie. Everything else about the project is in pyproject.toml.

`kernels/` and `train/` stand at the top of the repository but install as `ldalign.kernels` and `ldalign.train`: a
package named `kernels` exists on PyPI, and nothing but `ldalign` may appear at the top level of a user's environment.
Develop with an editable install (`make setup` makes one); without `kernels/__init__.py` it cannot find the package.
"""

from setuptools import setup

setup(
    packages=["ldalign", "ldalign.kernels", "ldalign.train"],
    package_dir={"ldalign": "ldalign", "ldalign.kernels": "kernels", "ldalign.train": "train"},
)
