"""What exists, and how to reach it. A block opens connections and builds argument lists; it runs no procedure."""
