"Package metadata: every field comes from settings.ini, which nbdev reads too."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def readme() -> str:
    "README.md with links that also lead somewhere from the package's page."
    text = (here / "README.md").read_text(encoding="utf-8")
    raw, blob = (f"{cfg['git_url']}/{kind}/{cfg['branch']}/" for kind in ("raw", "blob"))
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{raw}", text)
    return re.sub(r"(?<!!)(\[[^\]!]*\]\()(?!https?:|#|mailto:)", rf"\g<1>{blob}", text)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"], "Paper": "https://arxiv.org/abs/2506.10355"},
    license_expression="Apache-2.0 AND Unicode-3.0",
    license_files=["LICENSE", "CITATION.cff", "treelora/data/UNICODE-LICENSE.txt"],
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["treelora", "treelora.*"]),
    package_data={"treelora": ["weights/*.safetensors", "data/*.csv", "data/*.json.gz", "data/UNICODE-LICENSE.txt"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
