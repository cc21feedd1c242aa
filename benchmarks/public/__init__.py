"""Public measurements of serving as data (`serving_measured.csv`), and the models and devices that they are of."""
