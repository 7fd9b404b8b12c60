"""The features inside other libraries; each module needs its library and is imported only on request."""
