if __name__ != "surgeon.layers":
    raise ImportError("this folder is a part of surgeon: import surgeon.layers, not layers")
