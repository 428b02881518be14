"""What runs inside an allocation, outside the ranks. It queues no new chain."""
