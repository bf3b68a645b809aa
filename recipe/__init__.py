"""What is published, as data: a row for each data set, the recipes, the published YAML dialect."""
