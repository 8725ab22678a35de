if __name__ != "surgeon.zoo":
    raise ImportError("this folder is a part of surgeon: import surgeon.zoo, not zoo")
