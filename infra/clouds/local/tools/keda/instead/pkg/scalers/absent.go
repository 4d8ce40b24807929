package scalers

// externalMetricType is what an autoscaler calls a metric of KEDA's; all scalers share it.
const externalMetricType = "External"
