if __name__ != "surgeon.search":
    raise ImportError("this folder is a part of surgeon: import surgeon.search, not search")
