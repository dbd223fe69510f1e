"What pip needs to know; all of it stands in settings.ini. `python3 -m cfm_lab setup` is the way to install."
import configparser, shlex
from pathlib import Path
from setuptools import setup

here = Path(__file__).resolve().parent
cfg = configparser.ConfigParser()
cfg.read(here/"settings.ini", encoding="utf8")
s = cfg["DEFAULT"]
readme = here/"README.md"

setup(
    name=s["lib_name"], version=s["version"], description=s["description"], keywords=s["keywords"],
    author=s["author"], author_email=s["author_email"], license="Apache-2.0", license_files=["LICENSE"],
    long_description=readme.read_text(encoding="utf8") if readme.exists() else "", long_description_content_type="text/markdown",
    packages=["cfm_lab"], python_requires=">="+s["min_python"],
    install_requires=shlex.split(s["requirements"]), extras_require=dict(dev=shlex.split(s["dev_requirements"])),
    entry_points=dict(console_scripts=shlex.split(s["console_scripts"]), nbdev=["cfm_lab=cfm_lab._modidx:d"]))
