"""What people read: tables and cards."""
