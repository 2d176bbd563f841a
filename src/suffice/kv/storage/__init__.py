"""Storage of kept keys and values: equal heads, unequal heads, quantised."""
