"""Storage of kept keys and values: for heads of equal length, of unequal length, or quantized."""
