"""The paper's ablations again, `iared2 reproduce NAME`: the same code at the paper's scale and at one that two CPU cores manage."""
