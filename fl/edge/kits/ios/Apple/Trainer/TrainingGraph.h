#import <Foundation/Foundation.h>

NS_ASSUME_NONNULL_BEGIN

/// A training program of ExecuTorch, whose C++ interface Swift cannot see. Numbers are float32 in their own byte order.
@interface TrainingGraph : NSObject

/// nil if the file holds no program.
- (nullable instancetype)initWithFile:(NSString *)file;

/// One pass forward and backward over a batch; NO if the program refuses it. `classes`: labels are int64, else float32.
- (BOOL)passInputs:(NSData *)inputs
             shape:(NSArray<NSNumber *> *)shape
            labels:(NSData *)labels
        labelShape:(NSArray<NSNumber *> *)labelShape
           classes:(BOOL)classes;

/// The parameters' names, once there was a pass.
@property(nonatomic, readonly) NSArray<NSString *> *names;

- (nullable NSArray<NSNumber *> *)shapeOf:(NSString *)name;
- (nullable NSData *)valuesOf:(NSString *)name;

/// NO if they are not as many.
- (BOOL)setValues:(NSData *)values of:(NSString *)name;

- (BOOL)beginWithRate:(double)rate momentum:(double)momentum weightDecay:(double)weightDecay;

/// A step along the last pass's gradients.
- (BOOL)step;

@end

NS_ASSUME_NONNULL_END
