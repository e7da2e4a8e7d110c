"""The list of packages: two folders at the top of the repository install below ``peft_calib``."""

from setuptools import find_namespace_packages, find_packages, setup

MAPPED = {"peft_calib.trainer_callbacks": "trainer_callbacks", "peft_calib.metrics": "metrics"}

packages = find_packages(include=["peft_calib", "peft_calib.*"])
for name, folder in MAPPED.items():
    packages += [name] + [f"{name}.{below}" for below in find_namespace_packages(folder)]

setup(packages=packages, package_dir=MAPPED)
