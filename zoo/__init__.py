"""Networks that no library provides, by name: `create("resnet20_cifar")`."""

if __name__ != "surgeon.zoo":
    raise ImportError("this folder is a part of surgeon: import surgeon.zoo, not zoo")

from surgeon.records import providers
from surgeon.zoo import networks as networks  # fills the registry
from surgeon.zoo.foreign import load_foreign
from surgeon.zoo.provider import ZooProvider
from surgeon.zoo.registry import Entry, Published, create, entry, names, register

__all__ = ["Entry", "Published", "create", "entry", "load_foreign", "names", "register"]

providers.register("zoo", ZooProvider())
