"""Simulation of the generated Verilog: Verilator, cocotb benches and the layer bench."""
