"""The list of packages: two folders at the top of the repository install below ``peft_calib``."""

from setuptools import find_namespace_packages, setup

FOLDERS = {
    "peft_calib": "peft_calib",
    "peft_calib.trainer_callbacks": "trainer_callbacks",
    "peft_calib.metrics": "metrics",
}

packages = [
    name
    for parent, folder in FOLDERS.items()
    for name in [parent, *(f"{parent}.{below}" for below in find_namespace_packages(folder))]
    if "__pycache__" not in name
]

# The script's own module lies beside the package: what lies in it cannot be reached without loading torch. So does the
# plugin of vLLM, whose environment does not have what the package needs.
setup(
    packages=packages, package_dir=FOLDERS, py_modules=["peft_calib_cli", "peft_calib_vllm", "peft_calib_vllm_rules"]
)
