"""One script a claim: what Convoy is measured by, with its peer in the same run.

shapes.py has the models' shapes, common.py the rows that are printed and the parts that run in
processes of their own, device.py the GPU's times and memory, inputs.py random weights and rows.
"""
