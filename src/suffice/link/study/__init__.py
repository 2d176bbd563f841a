"""Studies of link predictors: arms, runs, results and reports."""
