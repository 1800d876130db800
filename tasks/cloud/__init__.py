"""What an account at a cloud provider holds."""
