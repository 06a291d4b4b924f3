"""The register map, as plain data.

The core has one register port: ``csr_address`` (register number), ``csr_write``,
``csr_write_data``, ``csr_read`` and ``csr_read_data`` (valid the cycle after ``csr_read``), all
registers 32 bits wide.
"""

__all__ = ["COUNTERS", "REGISTERS", "IDENTITY", "number"]

IDENTITY = 0x5351444D  # "SQDM"

# name: (number, access, fields {name: (low bit, bits, meaning)})
REGISTERS = {
    "identity": (0, "read", {"identity": (0, 32, "0x5351444D")}),
    "parameters": (1, "read", {
        "version": (0, 8, "descriptor version"),
        "vector": (8, 8, "V"),
        "dense_lanes": (16, 8, "K"),
        "sparse_pes": (24, 8, "sparse PEs")}),
    "control": (2, "write", {
        "start": (0, 1, "start the chain of passes at `descriptor`; ignored when busy")}),
    "status": (3, "read", {
        "busy": (0, 1, "a chain is running"),
        "done": (1, 1, "the last chain has ended, with or without error; cleared by start"),
        "error": (8, 8, "of the pass that ended the chain; see the error codes")}),
    "descriptor": (4, "read/write", {"address": (0, 32, "of the first descriptor, in port words")}),
    "evaluation": (5, "read/write", {"evaluation": (0, 16, "number of the network evaluation")}),
    "detector_entry": (6, "read/write", {
        "entry": (0, 16, "entry that detector_count writes or reads; one more after each access")}),
    "detector_count": (7, "read/write", {"count": (0, 16, "stored zero count; only when idle")}),
    "total_cycles": (8, "read", {"count": (0, 32, "from start to done")}),
    "compute_cycles": (9, "read", {
        "count": (0, 32, "convolve: from each run's start to its last sum merged")}),
    "dense_busy": (10, "read", {"count": (0, 32, "cycles in which a dense PE had work left")}),
    "sparse_busy": (11, "read", {"count": (0, 32, "cycles in which a sparse PE had work left")}),
    "stall_cycles": (12, "read", {
        "count": (0, 32, "cycles in which a PE with work left waited for room for its results")}),
    "dense_work": (13, "read", {"count": (0, 32, "words of V channels multiplied")}),
    "sparse_work": (14, "read", {"count": (0, 32, "non-zero activations multiplied")}),
    "saturations": (15, "read", {"count": (0, 32, "requantize: groups with a clipped element")}),
    "load_stall": (16, "read", {
        "count": (0, 32, "convolve: cycles without computing that waited for operands")}),
    "output_stall": (17, "read", {
        "count": (0, 32, "cycles in which a sum waited for the memory port")}),
    "jobs": (18, "read", {"count": (0, 32, "passes begun")}),
    "array": (19, "read", {
        "dense_pes": (0, 8, "dense PEs"),
        "sparse_lanes": (8, 8, "L"),
        "sparse_rate": (16, 8, "M")}),
}

COUNTERS = ("total_cycles", "compute_cycles", "dense_busy", "sparse_busy", "stall_cycles",
            "load_stall", "output_stall", "dense_work", "sparse_work", "saturations", "jobs")
"""Registers that count during a chain of passes and keep their values after it."""


def number(name):
    """Number of a register.

    Raises
    ------
    KeyError
        If there is no such register.
    """
    return REGISTERS[name][0]
