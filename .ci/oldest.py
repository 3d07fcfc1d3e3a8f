"Print the requirements of settings.ini with each lowest version as the only one, for pip: what `make test-oldest` installs."
from configparser import ConfigParser
from pathlib import Path

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
print("\n".join(config["DEFAULT"]["requirements"].replace(">=", "==").split()))
