"""Hardware: the SQ-DM core in Amaranth. This room never imports torch or the golden model."""
