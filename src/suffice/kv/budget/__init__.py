"""How the budget is split over layers and heads, and which entries are always kept."""
