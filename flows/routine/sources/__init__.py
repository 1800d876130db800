"""Where routine reports take their figures from."""
