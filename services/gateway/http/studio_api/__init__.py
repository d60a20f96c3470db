"""What the Ovi studio's browser front end says: REST and Socket.IO."""
